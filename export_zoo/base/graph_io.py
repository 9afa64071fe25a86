"""Load and save ONNX graphs, with external data above protobuf's 2 GiB limit."""

from __future__ import annotations

import gc
import hashlib
import mmap
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import onnx_ir as ir

EXTERNAL_DATA_THRESHOLD = 2**31 - 2**27
"""Bytes of weights from which they go to a file of their own: protobuf's limit is 2 GiB, and nodes take some of it."""

MODULE_KEY = "module"
"""Node metadata key that carries the PyTorch module path (`layer1.0.conv1`)."""


_HASHES: dict[tuple[int, ...], str] = {}
"""Hashes of unchanged files, by device, inode, size and time of the last change: an engine is asked for ten times."""
_HASHES_MAX = 4096
_TICK_NS = 2_000_000_000
"""Two changes within a tick of the file system's clock (FAT: two seconds) may bear the same time, so younger files are
read each time."""


def sha256_of(path: Path) -> str:
    """Hex SHA-256 of a file, read in blocks; read once in this process while the file does not change."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        status = os.fstat(file.fileno())
        key = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
        if known := _HASHES.get(key):
            return known
        settled = time.time_ns() - status.st_mtime_ns > _TICK_NS
        while block := file.read(1 << 20):
            digest.update(block)
    if settled:
        if len(_HASHES) >= _HASHES_MAX:
            _HASHES.clear()
        _HASHES[key] = digest.hexdigest()
    return digest.hexdigest()


_PILE = 256 << 20
"""Bytes of loaded graph files after which unused graphs are garbage-collected; see `quick_collections`."""


class _Pile:
    size = 0
    """Bytes loaded since the last collection."""


@contextmanager
def quick_collections() -> Iterator[None]:
    """Leave out of garbage collections, meanwhile, what lives now: tracing leaves PyTorch half a million objects.

    A collection then takes milliseconds. Objects that someone else froze stay frozen.
    """
    if gc.get_freeze_count():
        yield
        return
    gc.collect()  # else garbage lives on, too
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def load(path: Path) -> ir.Model:
    """Read a graph. External weights stay memory-mapped."""
    _Pile.size += path.stat().st_size
    if _Pile.size > _PILE:
        # A graph contains reference cycles: Python would keep it and its weights until the next automatic collection.
        gc.collect()
        _Pile.size = 0
    model = ir.load(path)
    for value in model.graph.initializers.values():
        if isinstance(tensor := value.const_value, ir.ExternalTensor):
            # An absolute path: below a base directory, onnx_ir refuses files with several hard links, as in the cache.
            value.const_value = _external(tensor, str((path.parent / tensor.location).absolute()), "")
    return model


def _external(tensor: ir.ExternalTensor, location: str, base: Path | str) -> ir.ExternalTensor:
    """The same bytes at the same offset, in the file `location` of the directory `base`."""
    return ir.ExternalTensor(
        location=location,
        offset=tensor.offset,
        length=tensor.length,
        dtype=tensor.dtype,
        shape=tensor.shape,
        name=tensor.name,
        base_dir=base,
    )


def save(model: ir.Model, path: Path, *, external_threshold: int | None = None) -> list[Path]:
    """Write a graph and return the files written: the graph, and its weights when they are external.

    The weights file is named by its own hash, so that the graph's reference to it stays valid when both are
    copied into a bundle.
    """
    weights = [v.const_value for v in model.graph.initializers.values() if v.const_value is not None]
    if external_threshold is None:
        external_threshold = EXTERNAL_DATA_THRESHOLD
    if sum(w.nbytes for w in weights) < external_threshold:
        ir.save(ir.external_data.load_to_model(model), path)
        return [path]
    temporary = path.with_name(path.name + ".weights")
    ir.save(model, path, external_data=temporary.name, size_threshold_bytes=1024)
    data = path.with_name(f"weights-{sha256_of(temporary)[:32]}.bin")
    temporary.replace(data)
    proto_model = ir.load(path)
    for value in proto_model.graph.initializers.values():
        if isinstance(tensor := value.const_value, ir.ExternalTensor):
            value.const_value = _external(tensor, data.name, path.parent)
    ir.save(proto_model, path)
    return [path, data]


def _tensors(model: ir.Model) -> Iterator[ir.TensorProtocol | None]:
    """All tensors of a model: initializers of its graphs, and attributes of its nodes."""
    for graph in (model.graph, *model.graph.subgraphs()):
        yield from (value.const_value for value in graph.initializers.values())
    roots: list[ir.Graph | ir.Function] = [model.graph, *model.functions.values()]
    for root in roots:
        for node in ir.traversal.RecursiveGraphIterator(root):
            for attribute in node.attributes.values():
                if attribute.type == ir.AttributeType.TENSOR:
                    yield attribute.as_tensor()
                elif attribute.type == ir.AttributeType.TENSORS:
                    yield from attribute.as_tensors()


def external_files(path: Path) -> list[Path]:
    """The external data files that a graph refers to, in order of name."""
    if path.stat().st_size:  # an empty file cannot be mapped
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            if content.find(b"location") < 0:  # each reference has this key: most graphs need not be parsed
                return []
    names = {
        str(tensor.location) for tensor in _tensors(ir.load(path)) if isinstance(tensor, ir.ExternalTensor)
    }
    return [path.parent / name for name in sorted(names)]


def module_of(node: ir.Node | None) -> str:
    """Module path recorded on a node, or an empty string."""
    return node.metadata_props.get(MODULE_KEY, "") if node is not None else ""


def describe(node: ir.Node) -> str:
    """Description of a node for messages: `Conv 'node_Conv_293' (module layer1.0.conv1)`."""
    module = module_of(node)
    return f"{node.op_type} {node.name!r}" + (f" (module {module})" if module else "")

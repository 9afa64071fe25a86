"""Reads a state dict from a file, unwraps it, and loads it strictly into a model."""

from __future__ import annotations

import fnmatch
import hashlib
import re
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torchvision.models import MNASNet

from export_zoo.base.errors import BadInputError, UsageError
from export_zoo.exporter.options import ExportOptions

_NESTED_KEYS = ("state_dict", "model_state_dict", "model")
_AVERAGED_KEYS = ("state_dict_ema", "model_ema", "ema_state_dict", "ema")
"""Keys of moving averages of the weights, in checkpoints of timm, torchvision's references and others."""
_PREFIXES = ("module.", "_orig_mod.")
_DENSENET = re.compile(
    r"^(.*denselayer\d+\.(?:norm|relu|conv))\.((?:[12])\.(?:weight|bias|running_mean|running_var))$"
)


@dataclass(frozen=True)
class Reading:
    """How a file becomes a model's state dict.

    Attributes:
        key: entry of a training checkpoint, such as `model_ema`; dots separate nested entries.
        renames: prefixes of names and their replacements.
        skip: glob patterns of names to leave out.
        allow_pickle: whether to run the code in a pickle.
    """

    key: str | None = None
    renames: tuple[tuple[str, str], ...] = ()
    skip: tuple[str, ...] = ()
    allow_pickle: bool = False

    @classmethod
    def of(cls, options: ExportOptions) -> Reading:
        """The settings of the command line."""
        return cls(options.weights_key, options.renames, options.skip_weights, options.allow_pickle)


@dataclass(frozen=True)
class Loaded:
    """A state dict, its entry in the file, the other entries there, and the names that were left out."""

    state: dict[str, torch.Tensor]
    versions: Mapping[str, Any] = field(default_factory=dict)
    """Version of each module's state, by module name, as PyTorch keeps it. Empty for safetensors and plain mappings."""
    entry: str = ""
    others: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()


@dataclass(frozen=True)
class LoadReport:
    """Result of loading weights: parameters left at random values, names of the file left out, the entry that was read,
    and the other entries."""

    initialized: list[str]
    skipped: list[str]
    entry: str
    others: list[str]


def state_digest(module: nn.Module) -> str:
    """SHA-256 over names, types and values of a module's state dict."""
    digest = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        if isinstance(tensor, torch.Tensor):
            digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\0".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _why_unreadable(path: Path, error: Exception) -> str:
    """The reason in short. PyTorch's own messages are long, give advice that does not apply, or are only a number."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    with path.open("rb") as file:
        start = file.read(16)
    if path.suffix == ".safetensors":
        return f"not a safetensors file: {error}"
    if start[8:9] == b"{":
        return "its content is that of a safetensors file: name it .safetensors"
    if start[:2] == b"PK" or start[:1] == b"\x80":
        if "weights_only" in str(error) or "WeightsUnpickler" in str(error):
            return "the pickle holds more than tensors"
        return f"damaged: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
    return "not a PyTorch file"


def _is_state(value: object) -> bool:
    return isinstance(value, Mapping) and any(isinstance(v, torch.Tensor) for v in value.values())


def _entry(path: Path, loaded: object, key: str | None) -> tuple[object, str, tuple[str, ...]]:
    """The state dict in a checkpoint, its key, and the keys of other state dicts there."""
    if key is not None:
        for part in key.split("."):
            if not isinstance(loaded, Mapping) or part not in loaded:
                has = ", ".join(map(str, loaded)) if isinstance(loaded, Mapping) else type(loaded).__name__
                raise BadInputError(
                    f"--weights-key {key}: {path} has no {part!r}", hint=f"it has: {has[:300] or 'nothing'}"
                )
            loaded = loaded[part]
        return _module_state(loaded), key, ()
    entry = ""
    others: tuple[str, ...] = ()
    known = (*_NESTED_KEYS, *_AVERAGED_KEYS)
    for name in known:
        if isinstance(loaded, Mapping) and isinstance(loaded.get(name), (Mapping, nn.Module)):
            others += tuple(k for k in known if k != name and _is_state(_module_state(loaded.get(k))))
            entry = f"{entry}.{name}" if entry else name
            loaded = loaded[name]
    return _module_state(loaded), entry, others


def _module_state(value: object) -> object:
    return value.state_dict() if isinstance(value, nn.Module) else value


def read_weights(path: Path, reading: Reading = Reading()) -> Loaded:
    """Read a state dict. Nested state dicts are unwrapped; `module.` and `_orig_mod.` prefixes are removed.

    From a training checkpoint, the weights are taken; moving averages only if there is nothing else. Pickles are read
    with `weights_only=True` unless `allow_pickle` is set.

    Raises:
        BadInputError: the file is not a state dict, is damaged, is a pickle that holds more than tensors, or does not
            have the key.
        UsageError: a rename or skip pattern matches nothing.
    """
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            loaded: object = load_file(path)
        else:
            loaded = torch.load(path, map_location="cpu", weights_only=not reading.allow_pickle)
    except Exception as error:
        text = _why_unreadable(path, error)
        raise BadInputError(
            f"--weights {path}: cannot be read as a state dict: {text}",
            hint="save it with torch.save(model.state_dict(), path) or safetensors.torch.save_file"
            + ("" if reading.allow_pickle else "; if you trust the file, --allow-pickle runs the code in it"),
        ) from error
    loaded, entry, others = _entry(path, loaded, reading.key)
    versions = dict(getattr(loaded, "_metadata", {}))
    if isinstance(loaded, Mapping) and any("_packed_params" in str(name) for name in loaded):
        raise BadInputError(
            f"--weights {path}: is a quantized checkpoint of torch.ao.quantization: its weights are integers for "
            "PyTorch's kernels",
            hint="give the float checkpoint from before `convert`; --precision int8 quantizes it",
        )
    if isinstance(loaded, Mapping):  # torch.optim.swa_utils.AveragedModel adds n_averaged
        loaded = {name: value for name, value in loaded.items() if name != "n_averaged"}
    if (
        not isinstance(loaded, Mapping)
        or not loaded
        or not all(isinstance(v, torch.Tensor) for v in loaded.values())
    ):
        raise BadInputError(
            f"--weights {path}: holds a {type(loaded).__name__}, not a mapping of names to tensors",
            hint=_entry_advice(loaded),
        )
    state = {str(name): tensor for name, tensor in loaded.items()}
    stripped = True
    while stripped:
        stripped = False
        for prefix in _PREFIXES:
            if all(name.startswith(prefix) for name in state):
                state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
                versions = {
                    f"{name}.".removeprefix(prefix)[:-1]: version
                    for name, version in versions.items()
                    if f"{name}.".startswith(prefix)
                }
                stripped = True
    for old, new in reading.renames:
        if not any(name.startswith(old) for name in state):
            raise UsageError(
                f"--rename {old}={new}: no name in {path} begins with {old!r}",
                hint=f"it has: {_shown(list(state))}",
            )

        def named(name: str, old: str = old, new: str = new) -> str:
            return new + name.removeprefix(old) if name.startswith(old) else name

        renamed = {named(name): tensor for name, tensor in state.items()}
        versions = {named(f"{name}.").removesuffix("."): version for name, version in versions.items()}
        if len(renamed) < len(state):
            raise UsageError(f"--rename {old}={new}: two names become one", hint="choose another prefix")
        state = renamed
    skipped = []
    for pattern in reading.skip:
        matched = [name for name in state if fnmatch.fnmatchcase(name, pattern)]
        if not matched:
            raise UsageError(
                f"--skip-weights {pattern}: matches no name in {path}", hint=f"it has: {_shown(list(state))}"
            )
        skipped += matched
        state = {name: tensor for name, tensor in state.items() if name not in matched}
    return Loaded(state, versions, entry, others, tuple(skipped))


_OBSERVERS = ("fake_quant", "activation_post_process")
"""Parts of the names that torch.ao.quantization gives to the observers of ranges."""


def _entry_advice(loaded: object) -> str:
    entries = [str(k) for k, v in loaded.items() if _is_state(v)] if isinstance(loaded, Mapping) else []
    if entries:
        return f"use --weights-key {entries[0]} to read the state dict in it"
    return "save model.state_dict(), not the model or the whole checkpoint"


def _shown(names: Sequence[str]) -> str:
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")


def load_into(
    model: nn.Module,
    state: dict[str, torch.Tensor],
    *,
    origin: str,
    init_missing: Sequence[str],
    versions: Mapping[str, Any] | None = None,
) -> list[str]:
    """Load a state dict strictly; returns the parameters left at their (seeded) random initialization.

    Args:
        versions: versions of modules' states, as in `Loaded`. A module updates an older state while loading it.
        init_missing: glob patterns of parameters that may be missing or have another shape, such as a new head.

    Raises:
        BadInputError: keys are missing, unexpected or mis-shaped; the message lists them.
    """
    # Old DenseNet checkpoints have dots in module names (`norm.1`), which PyTorch no longer allows. Without versions,
    # modules apply their own renaming of old checkpoints (ViT's MLP, BatchNorm's counter).
    state = {(f"{m[1]}{m[2]}" if (m := _DENSENET.match(name)) else name): t for name, t in state.items()}
    wanted = {name: tensor.shape for name, tensor in model.state_dict().items()}
    kinds = {n: t.dtype for n, t in model.state_dict().items() if n in state and t.is_floating_point()}
    if observers := [n for n in state if n not in wanted and any(part in n for part in _OBSERVERS)]:
        raise BadInputError(
            f"--weights {origin}: is a checkpoint of quantization-aware training (torch.ao.quantization): "
            f"{_shown(observers)}",
            hint="give the float checkpoint; or read the float weights in this one with "
            + " ".join(
                f"--skip-weights '*{part}*'" for part in _OBSERVERS if any(part in n for n in observers)
            )
            + ", and calibrate again with --precision int8",
        )
    if odd := [f"{n} ({state[n].dtype})" for n in kinds if not state[n].is_floating_point()]:
        raise BadInputError(
            f"--weights {origin}: not floating point: {_shown(odd)}",
            hint="quantized checkpoints cannot be exported: give the float weights",
        )
    misshaped = [name for name in wanted if name in state and state[name].shape != wanted[name]]
    given = OrderedDict((name, tensor) for name, tensor in state.items() if name not in misshaped)
    # MNASNet refuses a state dict without a version; torchvision publishes version 2.
    usual = {name: {"version": 2} for name, module in model.named_modules() if isinstance(module, MNASNet)}
    if known := {**usual, **(versions or {})}:
        given._metadata = known  # type: ignore[attr-defined]
    try:
        result = model.load_state_dict(given, strict=False)
    except (RuntimeError, ValueError) as error:
        text = " ".join(str(error).split())  # PyTorch lists every parameter
        text = text if len(text) < 300 else f"{text[:300]}..."
        raise BadInputError(f"--weights {origin}: {text}", hint=_ARCHITECTURE) from error
    absent = [name for name in result.missing_keys if name not in misshaped]

    def allowed(name: str) -> bool:
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in init_missing)

    problems = []
    if missing := [name for name in absent if not allowed(name)]:
        problems.append(f"missing: {_shown(missing)}")
    if result.unexpected_keys:
        problems.append(f"unexpected: {_shown(result.unexpected_keys)}")
    if wrong := [name for name in misshaped if not allowed(name)]:
        shapes = [f"{n} is {list(state[n].shape)}, expected {list(wanted[n])}" for n in wrong]
        problems.append(f"other shape: {_shown(shapes)}")
    if problems:
        raise BadInputError(f"--weights {origin}: {'; '.join(problems)}", hint=_advice(state, wanted, wrong))
    damaged = [
        n for n, t in model.state_dict().items() if t.is_floating_point() and not bool(t.isfinite().all())
    ]
    if damaged:
        raise BadInputError(
            f"--weights {origin}: not finite: {_shown(damaged)}",
            hint="use other weights: the training diverged",
        )
    initialized = sorted(name for name in [*absent, *misshaped] if allowed(name))
    for pattern in init_missing:
        if not any(fnmatch.fnmatchcase(name, pattern) for name in initialized):
            raise UsageError(
                f"--init-missing {pattern}: matches no missing or mis-shaped parameter",
                hint="leave it out, or check the pattern",
            )
    return initialized


_ARCHITECTURE = (
    "check that it is the state dict of this architecture; --init-missing PATTERN accepts a new head"
)


def _advice(state: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Size], wrong: Sequence[str]) -> str:
    """A hint for weights that do not fit. The usual reason is another head or input size."""
    prefix = f"{next(iter(state), '').partition('.')[0]}."
    if all(name.startswith(prefix) for name in state) and wanted.keys() & {
        n.removeprefix(prefix) for n in state
    }:
        return f"all names begin with {prefix!r}: --rename {prefix}= removes it"
    weights = [name for name in wanted if name.endswith(".weight")]  # empty if all are parametrized
    head = weights[-1].removesuffix(".weight") if weights else ""
    if f"{head}.weight" in wrong:
        found, expected = state[f"{head}.weight"].shape[0], wanted[f"{head}.weight"][0]
        # The auxiliary heads of googlenet and inception_v3 change with the head.
        heads = [n for n in wrong if (state[n].shape[0], wanted[n][0]) == (found, expected)]
        if len(heads) == len(wrong):
            return f"the file has {found} classes: pass --num-classes {found}, or --init-missing '{head}.*'"
    if any("pos_embedding" in name for name in wrong):
        return "pass the --input-size that the model was trained at: its position embeddings depend on it"
    return _ARCHITECTURE

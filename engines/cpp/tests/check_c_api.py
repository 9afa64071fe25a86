"""Checks the C interface from Python, through ctypes: check_c_api.py LIBRARY BUNDLES."""

from __future__ import annotations

import ctypes
import hashlib
import json
import shutil
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from ctypes import POINTER, byref, c_char_p, c_int, c_int32, c_int64, c_size_t, c_void_p
from functools import partial
from pathlib import Path

import numpy as np

MESSAGE = ctypes.CFUNCTYPE(None, c_void_p, c_int, c_char_p, c_char_p)
VALUES = np.ctypeslib.ndpointer(np.float32, flags="C_CONTIGUOUS")
SIGNATURES = {
    "version": (c_char_p,),
    "last_error": (c_char_p,),
    "set_log": (c_int, MESSAGE, c_void_p),
    "engine_load": (c_int, c_char_p, c_void_p, POINTER(c_void_p)),
    "engine_free": (None, c_void_p),
    "engine_text": (c_char_p, c_void_p, c_int),
    "engine_output_count": (c_int, c_void_p, c_int64, c_int64, c_int64, POINTER(c_size_t)),
    "context_create": (c_int, c_void_p, POINTER(c_void_p)),
    "context_free": (None, c_void_p),
    "infer": (c_int, c_void_p, VALUES, c_size_t, c_int64, c_int64, c_int64, VALUES, c_size_t),
    "preprocessor_create": (c_int, c_void_p, c_int64, c_int64, POINTER(c_void_p)),
    "preprocessor_free": (None, c_void_p),
    "preprocess": (c_int, c_void_p, c_char_p, c_size_t, VALUES, c_size_t),
}


class Options(ctypes.Structure):
    _fields_ = [
        ("struct_size", c_size_t),
        *((name, c_char_p) for name in ("engine", "onnxruntime", "openvino", "tensorrt")),
        *(
            (name, c_int32)
            for name in (
                "least",
                "allow_failed",
                "no_measure",
                "threads",
                "streams",
                "device",
                "no_spinning",
                "no_arena",
            )
        ),
    ]


class Zoo:
    def __init__(self, library: str) -> None:
        loaded = ctypes.CDLL(library)
        for name, (result, *arguments) in SIGNATURES.items():
            function = getattr(loaded, f"export_zoo_{name}")
            function.restype, function.argtypes = result, arguments
            setattr(self, name, function)

    def load(self, bundle: Path, engine: str) -> c_void_p:
        handle = c_void_p()
        options = Options(ctypes.sizeof(Options), engine.encode(), threads=1)
        code = self.engine_load(str(bundle).encode(), byref(options), byref(handle))
        assert code == 0, self.last_error()
        return handle

    def run(self, engine: c_void_p, inputs: np.ndarray, batch: int) -> np.ndarray:
        context, count = c_void_p(), c_size_t()
        assert self.context_create(engine, byref(context)) == 0, self.last_error()
        assert self.engine_output_count(engine, batch, 0, 0, byref(count)) == 0, self.last_error()
        outputs = np.empty((len(inputs), count.value // batch), np.float32)
        for start in range(0, len(inputs), batch):
            given, out = inputs[start : start + batch], outputs[start : start + batch]
            code = self.infer(context, given, given.size, batch, 0, 0, out, out.size)
            assert code == 0, self.last_error()
        self.context_free(context)
        return outputs


def check_values(zoo: Zoo, bundles: Path) -> None:
    want = np.load(bundles / "resnet18-inputs.npy")
    inputs = np.empty_like(want)
    for name in ("onnxruntime-fp32", "onnxruntime-int8"):
        engine, preprocessor = zoo.load(bundles / "resnet18.bundle", name), c_void_p()
        assert zoo.preprocessor_create(engine, 0, 0, byref(preprocessor)) == 0, zoo.last_error()
        for path, values in zip(sorted((bundles / "images").iterdir()), inputs, strict=True):
            data = path.read_bytes()
            code = zoo.preprocess(preprocessor, data, len(data), values, values.size)
            assert code == 0, zoo.last_error()
        zoo.preprocessor_free(preprocessor)
        assert np.array_equal(inputs, want), name
        logits = np.load(bundles / f"resnet18-{name}.npy")
        with ThreadPoolExecutor() as threads:
            found = list(threads.map(partial(zoo.run, engine, inputs), (1, 4, 8)))
        assert [np.array_equal(logits, one) for one in found] == [True] * 3, name
        zoo.engine_free(engine)


def check_metadata(zoo: Zoo, bundles: Path) -> None:
    for bundle in ("dynamic", "Pixels", "head-logit"):
        manifest = json.loads((bundles / f"{bundle}.bundle" / "manifest.json").read_text())
        engine = zoo.load(bundles / f"{bundle}.bundle", "onnxruntime-fp32")
        found = json.loads(zoo.engine_text(engine, 0))
        engine_of = found["engine"]
        assert (engine_of["name"], engine_of["precision"]) == ("onnxruntime-fp32", "fp32"), found
        assert (engine_of["state"], engine_of["why"]) == ("verified", "asked for"), found
        assert engine_of["backend"].startswith("ONNX Runtime 1."), found
        assert found["batch"] == {"min": 1, "opt": 4, "max": 8}, found
        assert found["labels"] == (["no", "yes"] if bundle == "head-logit" else []), found
        assert found["ok"] is True, found
        assert len(found["further_outputs"]) == (bundle == "Pixels"), found
        assert found["output"]["task"] in ("classification", "segmentation", "binary"), found
        assert found["output"]["scores"] == "logits", found
        if bundle == "dynamic":
            assert found["size"] == {"min": [48, 48], "opt": [64, 64], "max": [96, 96]}, found
            assert found["input"]["shape"] == [-1, 3, -1, -1], found
        assert found["model"] in json.dumps(manifest), found
        zoo.engine_free(engine)


def check_log(zoo: Zoo, bundles: Path) -> None:
    """A graph with a weight that nothing reads, of which ONNX Runtime warns."""
    messages: list[tuple[int | None, int, bytes, bytes]] = []
    log = MESSAGE(lambda *message: messages.append(message))
    with tempfile.TemporaryDirectory() as folder:
        bundle = Path(folder) / "unused.bundle"
        shutil.copytree(bundles / "head-logit.bundle", bundle)
        graph = (bundles / "unused.onnx").read_bytes()
        (bundle / "unused.onnx").write_bytes(graph)
        manifest = json.loads((bundle / "manifest.json").read_text())
        manifest["artifacts"]["engines"][0]["file"] = {
            "path": "unused.onnx",
            "sha256": hashlib.sha256(graph).hexdigest(),
            "size_bytes": len(graph),
        }
        (bundle / "manifest.json").write_text(json.dumps(manifest))
        assert zoo.set_log(log, 7) == 0, zoo.last_error()
        zoo.engine_free(zoo.load(bundle, "onnxruntime-fp32"))
        assert any(m[:3] == (7, 0, b"ONNX Runtime") and b"unused_weight" in m[3] for m in messages), messages
        assert zoo.set_log(MESSAGE(), None) == 0, zoo.last_error()
        count = len(messages)
        zoo.engine_free(zoo.load(bundle, "onnxruntime-fp32"))
        assert len(messages) == count, messages


def check_errors(zoo: Zoo) -> None:
    """Each thread has its own last error."""
    engine = c_void_p()
    messages: list[bytes] = []

    def fail(name: str) -> None:
        assert zoo.engine_load(name.encode(), None, byref(engine)) == 1
        messages.append(zoo.last_error())

    fail("first")
    thread = threading.Thread(target=lambda: (messages.append(zoo.last_error()), fail("second")))
    thread.start()
    thread.join()
    assert b"first" in messages[0], messages
    assert messages[1] == b"", messages
    assert b"second" in messages[2], messages
    assert zoo.last_error() == messages[0]


def main() -> None:
    zoo, bundles = Zoo(sys.argv[1]), Path(sys.argv[2])
    check_errors(zoo)
    check_values(zoo, bundles)
    check_metadata(zoo, bundles)
    check_log(zoo, bundles)


if __name__ == "__main__":
    main()

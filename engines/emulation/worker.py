"""The program that qemu-user runs: one engine, driven through pipes. Needs numpy, ONNX Runtime and its library.

    python -m export_zoo.engines.emulation.worker FILE WORKER

WORKER is a `targets.base.Worker` as JSON. The program first writes one line of
JSON: what it runs, or why it cannot run. Then it answers each batch with all outputs. Arrays are sent as .npy. A
message is the number of arrays, and for each array its length in bytes and its bytes.
"""

from __future__ import annotations

import io
import json
import os
import struct
import sys
from importlib import import_module
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float32]

_LENGTH = struct.Struct("<Q")


def send(stream: BinaryIO, arrays: tuple[Array, ...]) -> None:
    """Write arrays as one message."""
    stream.write(_LENGTH.pack(len(arrays)))
    for array in arrays:
        data = io.BytesIO()
        np.save(data, array)
        stream.write(_LENGTH.pack(data.tell()))
        stream.write(data.getvalue())
    stream.flush()


def receive(stream: BinaryIO) -> tuple[Array, ...] | None:
    """The arrays of the next message; None at the end of the stream, even in the middle of a message."""
    arrays = []
    count = stream.read(_LENGTH.size)
    if len(count) < _LENGTH.size:
        return None
    for _ in range(_LENGTH.unpack(count)[0]):
        length = stream.read(_LENGTH.size)
        if len(length) < _LENGTH.size:
            return None
        size = _LENGTH.unpack(length)[0]
        if len(data := stream.read(size)) < size:
            return None
        arrays.append(np.load(io.BytesIO(data)))
    return tuple(arrays)


def main() -> None:
    # Output that libraries print must not mix with the messages.
    requests, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    from export_zoo.base.errors import ExportZooError
    from export_zoo.base.machine import instruction_set, library_versions
    from export_zoo.engines.precision.int8.saturation.probe import saturates

    worker = json.loads(sys.argv[2])
    module, _, name = worker["engine"].partition(":")
    try:
        engine = getattr(import_module(module), name)(Path(sys.argv[1]), **worker["arguments"])
    except ExportZooError as error:
        said = {"error": error.message, "hint": error.hint, "exit_code": error.exit_code}
        answers.write(json.dumps(said).encode() + b"\n")
        return
    described = {
        "instruction_set": instruction_set(),
        "saturates": saturates(),
        "session_config": getattr(engine, "session_config", {}),
        "versions": library_versions("onnxruntime", worker["distribution"], "numpy"),
    }
    answers.write(json.dumps(described).encode() + b"\n")
    answers.flush()
    while (arrays := receive(requests)) is not None:
        (batch,) = arrays
        send(answers, engine.run_all(batch))


if __name__ == "__main__":
    main()

"""Named tensors as safetensors files."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Self

import safetensors
import torch
from safetensors.torch import load_file
from torch import Tensor

from secateur.errors import StorageError
from secateur.storage.attempt import Attempt
from secateur.storage.io_errors import wrap_io_errors
from secateur.storage.outputs import Output

# The format's names of element types.
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def write_tensors(
    attempt: Attempt, name: str, tensors: Mapping[str, Tensor], metadata: dict[str, str]
) -> None:
    """Write named tensors, and text as metadata, to one file.

    Tensors are written one after the other, so the file is never in memory as a whole.
    """
    with attempt.open(name) as file:
        for piece in _pieces(tensors, metadata):
            file.write(piece)


def read_tensors(output: Output, name: str) -> dict[str, Tensor]:
    """Return the tensors of a file, mapped into memory from the local file or its cached copy.

    Raises:
        StorageError: the file is damaged.
    """
    try:
        with output.local(name) as path:
            return load_file(path)
    except (safetensors.SafetensorError, OSError) as error:
        raise StorageError(
            f"{output.url(name)} is damaged ({error}); restore it or run that step again"
        ) from error


class TensorStack:
    """A stack of named tensors in temporary files. Only what was popped last is in memory.

    The files are in the folder that `TMPDIR` names. They are removed when the block ends.
    """

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="secateur-")
        self._count = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._folder.cleanup()

    def push(self, tensors: Mapping[str, Tensor]) -> None:
        """Put tensors on top of the stack."""
        path = self._path(self._count)
        with wrap_io_errors(str(path), "write"), path.open("wb") as file:
            for piece in _pieces(tensors, {}):
                file.write(piece)
        self._count += 1

    def pop(self) -> dict[str, Tensor]:
        """Take the tensors on top from the stack, mapped from their file, on the CPU."""
        self._count -= 1
        path = self._path(self._count)
        with wrap_io_errors(str(path), "read"):
            tensors = load_file(path)
            path.unlink()  # the mapping remains until the tensors are released
        return tensors

    def _path(self, number: int) -> Path:
        return Path(self._folder.name, f"{number:07d}.safetensors")


def _pieces(tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> Iterator[memoryview]:
    """The bytes of a file, one tensor after the other."""
    # Largest elements first, so that every tensor begins at a multiple of its element's size.
    order = sorted(tensors, key=lambda key: (-tensors[key].element_size(), key))
    yield memoryview(_header({key: tensors[key] for key in order}, metadata))
    for key in order:
        flat = tensors[key].detach().cpu().contiguous().reshape(-1)
        yield flat.view(torch.uint8).numpy().data


def _header(tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> bytes:
    """The beginning of a file: its length, then each tensor's type, shape and place as JSON."""
    entries: dict[str, object] = {"__metadata__": metadata} if metadata else {}
    start = 0
    for name, tensor in tensors.items():
        stop = start + tensor.nbytes
        entries[name] = {
            "dtype": DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, stop],
        }
        start = stop
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text

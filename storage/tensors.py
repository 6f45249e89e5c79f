"""Named tensors as safetensors files."""

from __future__ import annotations

from collections.abc import Mapping

import safetensors
from safetensors.torch import load_file, save
from torch import Tensor

from secateur.errors import StorageError
from secateur.storage.attempt import Attempt
from secateur.storage.outputs import Output


def write_tensors(
    attempt: Attempt, name: str, tensors: Mapping[str, Tensor], metadata: dict[str, str]
) -> None:
    """Write named tensors, and text as metadata, to one file."""
    contiguous = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
    attempt.write(name, save(contiguous, metadata or None))


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

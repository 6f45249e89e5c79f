"""Room `storage`: named tensors as safetensors files."""

from __future__ import annotations

from collections.abc import Mapping

import safetensors
from safetensors.torch import load_file, save
from torch import Tensor

from secateur.errors import StorageError
from secateur.storage.outputs import Attempt, Output


def write_tensors(
    attempt: Attempt, name: str, tensors: Mapping[str, Tensor], metadata: dict[str, str]
) -> None:
    """Writes named tensors and some text as one file."""
    contiguous = {key: t.detach().cpu().contiguous() for key, t in tensors.items()}
    attempt.write(name, save(contiguous, metadata or None))


def read_tensors(artefact: Output, name: str) -> dict[str, Tensor]:
    """Reads named tensors; they are mapped from the file where it is local.

    Raises:
        StorageError: the file is damaged.
    """
    try:
        with artefact.local(name) as path:
            return load_file(path)
    except (safetensors.SafetensorError, OSError) as error:
        raise StorageError(
            f"{artefact.url(name)} is damaged ({error}); restore it or run that step again"
        ) from error

"""Room `storage`: the ledger, one file a segment, and the checkpoint at the segment's end beside it.

The file's tensors are the fields of a segment's record as the recorder gave them, with `first_step` among them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from secateur.storage.outputs import Attempt, Output
from secateur.storage.tensors import read_tensors, write_tensors

LEDGER = "ledger.safetensors"
CHECKPOINT = "checkpoint.safetensors"


def write_ledger(attempt: Attempt, tensors: dict[str, Tensor], first_step: int) -> None:
    """Writes a segment's record."""
    write_tensors(attempt, LEDGER, tensors | {"first_step": torch.tensor(first_step)}, {})


def read_ledger(artefact: Output) -> tuple[dict[str, Tensor], int]:
    """A segment's record, mapped from its file, and its first step."""
    tensors = read_tensors(artefact, LEDGER)
    return tensors, int(tensors.pop("first_step"))


def write_checkpoint(attempt: Attempt, tensors: dict[str, Tensor]) -> None:
    """Writes weights, buffers and optimizer state."""
    write_tensors(attempt, CHECKPOINT, tensors, {})


def read_checkpoint(artefact: Output) -> dict[str, Tensor]:
    """Weights, buffers and optimizer state."""
    return read_tensors(artefact, CHECKPOINT)

"""The ledger: the record of contributions, one file per segment, with the checkpoint at its end.

The tensors of a file are the fields of the segment's record as the recorder wrote them, and
`first_step`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from secateur.storage.attempt import Attempt
from secateur.storage.outputs import Output
from secateur.storage.tensors import read_tensors, write_tensors

LEDGER = "ledger.safetensors"
CHECKPOINT = "checkpoint.safetensors"


def write_ledger(attempt: Attempt, tensors: dict[str, Tensor], first_step: int) -> None:
    """Write the record of a segment."""
    write_tensors(attempt, LEDGER, tensors | {"first_step": torch.tensor(first_step)}, {})


def read_ledger(output: Output) -> tuple[dict[str, Tensor], int]:
    """Return the record of a segment, mapped from its file, and its first step."""
    tensors = read_tensors(output, LEDGER)
    first_step = int(tensors.pop("first_step"))
    return tensors, first_step


def write_checkpoint(attempt: Attempt, tensors: dict[str, Tensor]) -> None:
    """Write weights, buffers and optimizer state."""
    write_tensors(attempt, CHECKPOINT, tensors, {})


def read_checkpoint(output: Output) -> dict[str, Tensor]:
    """Return weights, buffers and optimizer state."""
    return read_tensors(output, CHECKPOINT)

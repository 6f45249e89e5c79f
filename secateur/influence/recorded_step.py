"""The recordings of one optimizer step: its micro-batches, before the optimizer takes the step."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from secateur.influence.recorded_batch import RecordedBatch


@dataclass
class RecordedStep:
    """The recordings of one step, before the optimizer takes it.

    Attributes:
        batches: the recorded batch, or its micro-batches.
        fisher: contributions with labels sampled from the model, and their weights.
        stride: the number of steps that this one's curvature represents; 0 without a batch.
    """

    batches: list[RecordedBatch] = field(default_factory=list)
    fisher: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    stride: float = 0.0

    def total(self) -> Float[Tensor, " p"] | None:
        """Return the sum of all contributions, or None without a batch."""
        sums = [b.coefficients.sum(0) for b in self.batches if b.coefficients is not None]
        return torch.stack(sums).sum(0) if sums else None

"""The recordings of one optimizer step: its micro-batches, before the optimizer takes the step."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from secateur.influence.process_group import Ranks
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

    def total(self, like: Float[Tensor, " p"], ranks: Ranks) -> Float[Tensor, " p"] | None:
        """Return the sum of all contributions, or None if no process has a batch.

        Over several processes it is a mean: they are contributions to the mean gradient.

        Args:
            like: a tensor of the sum's shape, dtype and device.
            ranks: the processes that record the step.
        """
        sums = [b.coefficients.sum(0) for b in self.batches if b.coefficients is not None]
        own = torch.stack(sums).sum(0) if sums else torch.zeros_like(like)
        if ranks.size == 1:
            return own if sums else None
        # One exchange tells both the sum and whether anything was recorded.
        counted = ranks.sum(torch.cat([own, own.new_full((1,), len(sums))])) / ranks.size
        return counted[:-1] if counted[-1] > 0 else None

"""Room `secateur`: the record of one segment, a run of consecutive optimizer steps, as plain tensors."""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cached_property
from itertools import pairwise

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass(frozen=True)
class Segment:
    """What a segment's steps did, in the coordinates of a basis of `p` numbers (DESIGN, section 1).

    A record is one use of one sample at one step; `records` are sorted by step. Step arrays have one row an
    optimizer step, recorded or not, because the recursion passes through every one of them.

    Attributes:
        contributions: each record's part of the gradient that the optimizer received at its step.
        samples: the caller's sample ids.
        positions: the record's place among the samples of its step.
        steps: step of each record within the stage, from 0.
        weights: weight of the sample in the loss times the step's scale, so `contribution = weight * grad loss_i`.
        losses: the sample's own loss before the step.
        errors: norm of the gradient of the sample's own loss with respect to the output of the model's last layer. Where
            the loss is a cross-entropy of these logits it is the norm of softmax minus one-hot, EL2N (Paul et al., 2021);
            over several positions the root of the sum of squares.
        windows: the selection window the record falls in; -1 where it serves the curvature only.
        first_step: step within the stage of row 0 of the step arrays.
        strides: how many steps the curvature of this one stands for; 0 where nothing was recorded.
        scales: factor between the loss's gradient and the one the optimizer received (clipping by norm).
        hyper: each parameter group's settings, columns as the optimizer's `hyper` names them.
        gradients: the gradient received; empty `0 p` where the optimizer's Jacobian does not depend on it.
        states: theta and the optimizer's slots before the step; empty where the Jacobian does not depend on them.
        groups: parameter group of each of the p numbers.
        fisher: contributions with labels sampled from the model (`curvature: fisher`), `fisher_steps` their steps and
            `fisher_weights` their weights; empty otherwise.
        hessian: evaluations of the Hessian (`curvature: hessian`), each span's matrix flattened after the other, and
            `hessian_steps` the steps they were made before; empty otherwise.
    """

    contributions: Float[Tensor, "records p"]
    samples: Int[Tensor, " records"]
    positions: Int[Tensor, " records"]
    steps: Int[Tensor, " records"]
    weights: Float[Tensor, " records"]
    losses: Float[Tensor, " records"]
    errors: Float[Tensor, " records"]
    windows: Int[Tensor, " records"]
    first_step: int
    strides: Float[Tensor, " steps"]
    scales: Float[Tensor, " steps"]
    hyper: Float[Tensor, "steps groups names"]
    gradients: Float[Tensor, "rows p"]
    states: Float[Tensor, "rows S p"]
    groups: Int[Tensor, " p"]
    fisher: Float[Tensor, "fisher_records p"]
    fisher_steps: Int[Tensor, " fisher_records"]
    fisher_weights: Float[Tensor, " fisher_records"]
    hessian: Float[Tensor, "evaluations entries"]
    hessian_steps: Int[Tensor, " evaluations"]

    @property
    def length(self) -> int:
        """Number of optimizer steps."""
        return len(self.strides)

    @property
    def size(self) -> int:
        """Numbers a record, p."""
        return self.contributions.shape[1]

    @property
    def selected(self) -> Bool[Tensor, " records"]:
        """Records that fall in a selection window, and so are embedded, scored and judged."""
        return self.windows >= 0

    def rows(self, step: int) -> slice:
        """Records of the step `step` (counted in the stage)."""
        return self._runs[step - self.first_step]

    def fisher_rows(self, step: int) -> slice:
        """Fisher records of the step `step`."""
        return self._fisher_runs[step - self.first_step]

    def tensors(self) -> dict[str, Tensor]:
        """Every field that is a tensor, by name; with `first_step` it is the whole segment."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "first_step"}

    @cached_property
    def _runs(self) -> list[slice]:
        return self._runs_of(self.steps)

    @cached_property
    def _fisher_runs(self) -> list[slice]:
        return self._runs_of(self.fisher_steps)

    def _runs_of(self, steps: Tensor) -> list[slice]:
        """Where each step of the segment stands in the sorted `steps`."""
        asked = torch.arange(self.first_step, self.first_step + self.length + 1)
        return [
            slice(begin, end) for begin, end in pairwise(torch.searchsorted(steps, asked).tolist())
        ]

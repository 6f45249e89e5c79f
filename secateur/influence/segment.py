"""The record of one segment, a run of consecutive optimizer steps, as plain tensors."""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cached_property
from itertools import pairwise

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass(frozen=True)
class Segment:
    """A segment's contributions, in a basis of `p` coefficients, and its steps' settings.

    A record is one use of one sample at one step. The `records` dimension is sorted by step. Arrays
    of `steps` have one row per optimizer step, recorded or not, because the recursion passes
    through every one.

    Attributes:
        contributions: each record's part of the gradient that the optimizer received at its step.
        samples: the caller's sample ids.
        positions: the record's place among the samples of its step.
        steps: step of each record within the stage, from 0.
        weights: weight of the sample in the loss times the step's scale, so that
            `contribution = weight * grad loss_i`.
        losses: the sample's own loss before the step.
        errors: norm of the gradient of the sample's own loss with respect to the output of the
            model's last layer. For a cross-entropy of these logits it is the norm of softmax minus
            one-hot, EL2N (Paul et al., 2021). Over several positions it is the root of the sum of
            squares.
        windows: the selection window that the record falls in; -1 if it serves the curvature only.
        first_step: step within the stage of row 0 of the step arrays.
        strides: the number of steps that the curvature of this one represents; 0 if nothing was
            recorded.
        scales: factor between the loss's gradient and the one that the optimizer received (clipping
            by norm).
        hyper: each parameter's settings; the update rule's `hyper` names the columns. They are
            not-a-number where the parameter had no gradient, so that the step left it as it was.
        gradients: the gradient received; empty `0 p` if the optimizer's Jacobian does not depend on
            it.
        states: theta and the optimizer's slots before the step; empty if the Jacobian does not
            depend on them.
        groups: row of `hyper` that each of the p coefficients is updated with.
        fisher: contributions with labels drawn from the model, or with random signs, whose outer
            products estimate the curvature (see `curvature.Fisher`); empty otherwise.
        fisher_steps: the step of each of these.
        fisher_weights: the weight of each of these, divided by the factor of its outer product.
        hessian: evaluations of the Hessian or the Gauss-Newton matrix (`curvature: hessian`,
            `gauss_newton`), the spans' matrices flattened and concatenated; empty otherwise.
        hessian_steps: the step before which each of these was made.
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
        """Number of coefficients per record, p."""
        return self.contributions.shape[1]

    @property
    def selected(self) -> Bool[Tensor, " records"]:
        """The records that fall in a selection window. Only these are embedded and scored."""
        return self.windows >= 0

    def rows(self, step: int) -> slice:
        """Return the records of a step, which is counted within the stage."""
        return self._record_slices[step - self.first_step]

    def tensors(self) -> dict[str, Tensor]:
        """Return every tensor field by name. With `first_step` they are the whole segment."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "first_step"}

    @cached_property
    def _record_slices(self) -> list[slice]:
        return self._slices_by_step(self.steps)

    def _slices_by_step(self, steps: Int[Tensor, " n"]) -> list[slice]:
        """Return the slice of the sorted `steps` that belongs to each step of the segment."""
        numbers = torch.arange(self.first_step, self.first_step + self.length + 1)
        bounds = torch.searchsorted(steps, numbers).tolist()
        return [slice(begin, end) for begin, end in pairwise(bounds)]

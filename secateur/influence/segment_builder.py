"""The segment being recorded: its columns, which grow by one entry per step."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor

from secateur.influence.gathered_records import gather_records
from secateur.influence.process_group import Ranks
from secateur.influence.recorded_batch import RecordedBatch, finish_batch
from secateur.influence.recorded_step import RecordedStep
from secateur.influence.segment import Segment


@dataclass
class SegmentBuilder:
    """The steps recorded since the last segment, one list entry per step.

    Attributes:
        first_step: step within the stage of the first entry.
        batches: the recorded batches of each step.
        fisher: contributions with labels sampled from the model, and their weights.
        hessian: evaluations of the Hessian, each with the step before which it was made.

    The other columns are the fields of a `Segment`.
    """

    first_step: int
    batches: list[list[RecordedBatch]] = field(default_factory=list)
    strides: list[float] = field(default_factory=list)
    scales: list[float] = field(default_factory=list)
    hyper: list[list[list[float]]] = field(default_factory=list)
    gradients: list[Tensor] = field(default_factory=list)
    states: list[Tensor] = field(default_factory=list)
    fisher: list[list[tuple[Tensor, Tensor]]] = field(default_factory=list)
    hessian: list[tuple[int, Tensor]] = field(default_factory=list)

    @property
    def next_step(self) -> int:
        """The number of the next step."""
        return self.first_step + len(self.strides)

    def add_step(
        self, step: RecordedStep, scale: float, hyper: list[list[float]], share: float = 1.0
    ) -> None:
        """Add the recordings of a step.

        Args:
            step: the recordings.
            scale: factor applied to the step's gradient after the backward pass.
            hyper: each parameter group's settings.
            share: factor of this process's gradient in the mean over all processes.
        """
        for batch in step.batches:
            finish_batch(batch, scale * share)
        self.batches.append(step.batches)
        self.strides.append(step.stride)
        self.scales.append(scale)
        factor = scale * share
        self.fisher.append([(rows * factor, weights * factor) for rows, weights in step.fisher])
        self.hyper.append(hyper)

    def add_state(self, gradient: Float[Tensor, " p"], state: Float[Tensor, "S p"]) -> None:
        """Add the gradient and state that a step read, if the optimizer's Jacobian needs them."""
        self.gradients.append(gradient)
        self.states.append(state)

    def build(
        self, groups: Int[Tensor, " p"], dtype: torch.dtype, ranks: Ranks | None = None
    ) -> Segment:
        """Return the segment on the CPU.

        Args:
            groups: row of the settings that each of the p coefficients is updated with.
            dtype: of the contributions.
            ranks: the processes whose records come together in the first one's segment. The
                segments of the others have no records.
        """
        empty = torch.empty(0, len(groups), dtype=dtype)
        records = self._record_tensors(empty)
        steps = self._step_tensors(empty)
        curvature = self._curvature_tensors(empty)
        if ranks is not None and ranks.size > 1:
            records, steps, curvature = gather_records(records, steps, curvature, ranks)
        return Segment(first_step=self.first_step, groups=groups, **records, **steps, **curvature)

    def _record_tensors(self, empty: Float[Tensor, "0 p"]) -> dict[str, Tensor]:
        """Return the fields of a segment that have one row per record."""
        batches = [batch for one_step in self.batches for batch in one_step]
        lengths = [sum(len(batch.samples) for batch in one_step) for one_step in self.batches]
        numbers = torch.arange(self.first_step, self.first_step + len(lengths))
        contributions = [b.coefficients.cpu() for b in batches if b.coefficients is not None]
        return {
            "contributions": torch.cat([empty, *contributions]),
            "samples": _join_integers(b.samples.cpu().long() for b in batches),
            "positions": _join_integers(torch.arange(n) for n in lengths),
            "steps": numbers.repeat_interleave(torch.tensor(lengths, dtype=torch.int64)),
            "weights": _join_floats(b.weights for b in batches),
            "losses": _join_floats(b.losses for b in batches if b.losses is not None),
            "errors": _join_floats(b.errors for b in batches if b.errors is not None),
            "windows": _join_integers(torch.full((len(b.samples),), b.window) for b in batches),
        }

    def _step_tensors(self, empty: Float[Tensor, "0 p"]) -> dict[str, Tensor]:
        """Return the fields of a segment that have one row per step."""
        # A tensor of an empty list would have one dimension.
        hyper = torch.empty(0, 0, 0, dtype=torch.float64)
        if self.hyper:
            hyper = torch.tensor(self.hyper, dtype=torch.float64)
        gradients = empty
        states = empty[:, None].expand(0, 0, empty.shape[1])
        if self.gradients:
            gradients = torch.stack(self.gradients).cpu()
            states = torch.stack(self.states).cpu()
        return {
            "strides": torch.tensor(self.strides, dtype=torch.float64),
            "scales": torch.tensor(self.scales, dtype=torch.float64),
            "hyper": hyper,
            "gradients": gradients,
            "states": states,
        }

    def _curvature_tensors(self, empty: Float[Tensor, "0 p"]) -> dict[str, Tensor]:
        """Return the fields of a segment that serve the curvatures `fisher` and `hessian` only."""
        parts = [
            (self.first_step + i, rows, weights)
            for i, one_step in enumerate(self.fisher)
            for rows, weights in one_step
        ]
        hessian = empty
        if self.hessian:
            hessian = torch.stack([flattened.cpu() for _, flattened in self.hessian])
        return {
            "fisher": torch.cat([empty, *(rows.cpu() for _, rows, _ in parts)]),
            "fisher_steps": _join_integers(
                torch.full((len(rows),), step) for step, rows, _ in parts
            ),
            "fisher_weights": _join_floats(weights for _, _, weights in parts),
            "hessian": hessian,
            "hessian_steps": torch.tensor([step for step, _ in self.hessian], dtype=torch.int64),
        }


def _join_integers(parts: Iterable[Tensor]) -> Int[Tensor, " n"]:
    return torch.cat([torch.empty(0, dtype=torch.int64), *parts])


def _join_floats(parts: Iterable[Tensor]) -> Float[Tensor, " n"]:
    return torch.cat([torch.empty(0, dtype=torch.float64), *(p.cpu().double() for p in parts)])

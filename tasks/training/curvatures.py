"""The curvatures that a plan can name: the settings of each, and what it records in training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, PositiveInt
from torch import Tensor

from secateur.errors import PlanError
from secateur.influence.curvature import (
    Curvature,
    EmpiricalFisher,
    Fisher,
    Hessian,
    NoCurvature,
)
from secateur.influence.hessian import compute_hessian
from secateur.influence.recorder import Recorder
from secateur.influence.segment import Segment
from secateur.tasks.data.seeds import seed_for
from secateur.tasks.plan import CurvatureConfig, register_curvature
from secateur.tasks.training.loop import MicroBatch, TrainingLoop


@register_curvature
class EmpiricalFisherConfig(CurvatureConfig):
    """Computed from the recorded contributions; it needs no extra passes."""

    kind: Literal["empirical_fisher"] = "empirical_fisher"

    def build(self, segment: Segment, spans: Sequence[slice]) -> Curvature:
        return EmpiricalFisher(segment, spans)


@register_curvature
class FisherConfig(CurvatureConfig):
    """Computed from labels sampled from the model, with one more pass per recorded step.

    The task needs a method `sampled(model, batch)`.
    """

    kind: Literal["fisher"] = "fisher"
    needs_own_loop: ClassVar[bool] = True

    def build(self, segment: Segment, spans: Sequence[slice]) -> Curvature:
        return Fisher(segment, spans)

    def record_step(
        self, recorder: Recorder, loop: TrainingLoop, segment: range, step: int, recorded: bool
    ) -> None:
        if not recorded:
            return
        sample_labels = _label_sampler(loop)
        torch.manual_seed(seed_for(loop.schedule.seed(step), "fisher"))
        for part in loop.micro_batches(step):
            with torch.no_grad(), loop.precision():
                relabelled = sample_labels(loop.model, part.tensors)
            recorder.record_fisher(loop.losses_of(relabelled), part.weights)


@register_curvature
class HessianConfig(CurvatureConfig):
    """Exact in the basis, by Hessian-vector products."""

    kind: Literal["hessian"] = "hessian"
    every: PositiveInt = Field(20, description="steps that one evaluation is used for")
    samples: PositiveInt = Field(
        512, description="at most so many samples of those steps, evenly spaced"
    )
    needs_own_loop: ClassVar[bool] = True

    def build(self, segment: Segment, spans: Sequence[slice]) -> Curvature:
        return Hessian(segment, spans)

    def record_step(
        self, recorder: Recorder, loop: TrainingLoop, segment: range, step: int, recorded: bool
    ) -> None:
        if (step - segment.start) % self.every == 0:
            coming = range(step, min(step + self.every, segment.stop))
            recorder.record_hessian(self._evaluate(recorder, loop, coming))

    def _evaluate(self, recorder: Recorder, loop: TrainingLoop, steps: range) -> Tensor:
        """The Hessian now, of the mean loss of the coming steps.

        A step that online selection has yet to choose for is left out, because its samples are not
        known. If there are more than `samples` samples, evenly spaced ones are read.
        """
        known = [
            step
            for step in steps
            if step in loop.selected_rows or not loop.schedule.selection_at(step)
        ]
        parts = [part for step in known for part in loop.micro_batches(step)]
        rows = torch.cat([part.rows for part in parts])
        weights = torch.cat([part.weights for part in parts]) / len(known)
        chosen = torch.linspace(0, len(rows) - 1, min(len(rows), self.samples)).round().long()
        share = weights[chosen] * (weights.sum() / weights[chosen].sum())
        torch.manual_seed(loop.schedule.seed(steps.start))
        size = max(len(part.rows) for part in parts)
        losses = [
            partial(_weighted_loss, loop, MicroBatch(r, loop.batch(r), w))
            for r, w in zip(rows[chosen].split(size), share.split(size), strict=True)
        ]
        basis = recorder.basis
        spans = basis.spans if self.coupling == "block" else [slice(0, basis.size)]
        return compute_hessian(losses, loop.model, basis, spans)


@register_curvature
class NoCurvatureConfig(CurvatureConfig):
    """The gradient is taken not to change with the parameters."""

    kind: Literal["none"] = "none"

    def build(self, segment: Segment, spans: Sequence[slice]) -> Curvature:
        return NoCurvature(segment, spans)


def _weighted_loss(loop: TrainingLoop, part: MicroBatch) -> Tensor:
    losses = loop.part_losses(part, loop.model)
    return (losses * part.weights.to(losses)).sum()


def _label_sampler(loop: TrainingLoop) -> Callable[..., dict[str, Any]]:
    """The task's method that samples labels from the model.

    Raises:
        PlanError: the task has none.
    """
    sampler: Callable[..., dict[str, Any]] | None = getattr(loop.task, "sampled", None)
    if sampler is None:
        raise PlanError(
            f"`curvature: {{kind: fisher}}` needs a method sampled(model, batch) on "
            f"{loop.run.plan.task.factory}, which returns the batch with labels sampled from the "
            f"model"
        )
    return sampler

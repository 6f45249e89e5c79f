"""The curvatures that a plan can name: the settings of each, and what it records in training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from pydantic import Field, PositiveInt
from torch import Tensor

from secateur.errors import PlanError
from secateur.influence.bindings import LossesOf
from secateur.influence.curvature import (
    Curvature,
    EmpiricalFisher,
    Fisher,
    Hessian,
    NoCurvature,
)
from secateur.influence.gauss_newton import compute_gauss_newton
from secateur.influence.hessian import compute_hessian
from secateur.influence.recorder import Recorder
from secateur.influence.segment import Segment
from secateur.influence.vector_products import ComputeMatrices
from secateur.tasks.data.collate import Tensors
from secateur.tasks.data.seeds import seed_for
from secateur.tasks.data.take_samples import take_samples
from secateur.tasks.plan import CurvatureConfig, register_curvature
from secateur.tasks.run import LearningTask
from secateur.tasks.training.division import process_seed
from secateur.tasks.training.loop import MicroBatch, TrainingLoop


class _DrawnConfig(CurvatureConfig):
    """A curvature estimated from gradients with random labels or signs, averaged over a segment."""

    draws: PositiveInt | None = Field(
        None, description="such gradients per recorded step; null means one for each sample"
    )
    rows: PositiveInt = Field(
        1024, description="at most so many of them per segment, so that a step may have fewer"
    )

    def count_gradients(self, task: LearningTask, steps: int, batch: int) -> int:
        return self._draws_per_step(steps, batch) * steps

    def _draws_per_step(self, steps: int, batch: int) -> int:
        return min(self.draws or batch, max(1, self.rows // max(1, steps)))

    def _record(
        self,
        recorder: Recorder,
        loop: TrainingLoop,
        segment: range,
        step: int,
        draw: Callable[[Tensors], LossesOf],
    ) -> None:
        """Record gradients of a step. `draw` returns the losses of some samples, drawn at random.

        Several processes make as many passes each, because they may hold the model together.
        """
        ranks = loop.ranks
        torch.manual_seed(seed_for(process_seed(loop.schedule.seed(step), ranks.rank), self.kind))
        parts = loop.micro_batches(step)
        own = sum(len(part.rows) for part in parts)
        samples = int(ranks.sum(torch.tensor(float(own))))
        wanted = self._draws_per_step(len(segment), samples)
        for part in parts:
            total = len(part.rows)
            count = max(1, round(wanted * total / samples))
            whole = [torch.arange(total)] * (count // total)
            chosen = torch.cat([*whole, torch.randperm(total)[: count % total].sort().values])
            tensors = take_samples(part.tensors, chosen)
            factors = _positions(loop, tensors, count) * (total / count)
            recorder.record_fisher(draw(tensors), part.weights[chosen] * ranks.size, factors)


@register_curvature
class EmpiricalFisherConfig(_DrawnConfig):
    """Computed from the recorded contributions, if each sample's loss has one output position.

    If it is a mean over several, the task's method `signed_losses(model, batch)` gives each of them
    a random sign, and one more pass per recorded step gives the gradients.
    """

    kind: Literal["empirical_fisher"] = "empirical_fisher"

    def count_gradients(self, task: LearningTask, steps: int, batch: int) -> int:
        if getattr(task, "signed_losses", None) is None:
            return 0
        return super().count_gradients(task, steps, batch)

    def build(self, segment: Segment, spans: Sequence[slice]) -> Curvature:
        return Fisher(segment, spans) if len(segment.fisher) else EmpiricalFisher(segment, spans)

    def record_step(
        self, recorder: Recorder, loop: TrainingLoop, segment: range, step: int, recorded: bool
    ) -> None:
        signed_losses = getattr(loop.task, "signed_losses", None)
        if recorded and signed_losses is not None:
            draw = partial(loop.losses_of, compute=signed_losses)
            self._record(recorder, loop, segment, step, draw)


@register_curvature
class FisherConfig(_DrawnConfig):
    """Computed from labels drawn from the model, with one more pass per recorded step.

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

        def draw(tensors: Tensors) -> LossesOf:
            with torch.no_grad(), loop.precision():
                relabelled = sample_labels(loop.model, tensors)
            return loop.losses_of(relabelled)

        self._record(recorder, loop, segment, step, draw)


class _EvaluatedConfig(CurvatureConfig):
    """A matrix that is evaluated once every few steps, exactly in the basis."""

    coupling: Literal["block", "full"] = Field(
        "block", description="`full` if a change in one block changes the gradient of the others"
    )
    every: PositiveInt = Field(20, description="steps that one evaluation is used for")
    samples: PositiveInt = Field(
        512, description="at most so many samples of those steps, evenly spaced"
    )
    needs_own_loop: ClassVar[bool] = True
    compute_matrices: ClassVar[ComputeMatrices]

    def count_matrices(self, steps: int) -> int:
        return -(-steps // self.every)

    def build(self, segment: Segment, spans: Sequence[slice]) -> Curvature:
        return Hessian(segment, spans)

    def record_step(
        self, recorder: Recorder, loop: TrainingLoop, segment: range, step: int, recorded: bool
    ) -> None:
        if (step - segment.start) % self.every == 0:
            coming = range(step, min(step + self.every, segment.stop))
            recorder.record_hessian(self._evaluate(recorder, loop, coming))

    def _evaluate(self, recorder: Recorder, loop: TrainingLoop, steps: range) -> Tensor:
        """The matrix now, of the mean loss of the coming steps.

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
        return self.compute_matrices(losses, loop.model, basis, spans)


@register_curvature
class HessianConfig(_EvaluatedConfig):
    """Exact, by Hessian-vector products."""

    kind: Literal["hessian"] = "hessian"
    compute_matrices: ClassVar[ComputeMatrices] = staticmethod(compute_hessian)


@register_curvature
class GaussNewtonConfig(_EvaluatedConfig):
    """Of a model taken as linear in its parameters. The task must call the model for its losses."""

    kind: Literal["gauss_newton"] = "gauss_newton"
    compute_matrices: ClassVar[ComputeMatrices] = staticmethod(compute_gauss_newton)


@register_curvature
class NoCurvatureConfig(CurvatureConfig):
    """The gradient is taken not to change with the parameters."""

    kind: Literal["none"] = "none"

    def build(self, segment: Segment, spans: Sequence[slice]) -> Curvature:
        return NoCurvature(segment, spans)


def _weighted_loss(loop: TrainingLoop, part: MicroBatch) -> Tensor:
    losses = loop.part_losses(part, loop.model)
    return (losses * part.weights.to(losses)).sum()


def _positions(loop: TrainingLoop, tensors: Tensors, count: int) -> Float[Tensor, " batch"]:
    """The number of output positions that each sample's loss is the mean of."""
    if not hasattr(loop.task, "sizes"):
        return torch.ones(count, dtype=torch.float64)
    sizes: Tensor = loop.task.sizes(tensors)
    return sizes.double().cpu().clamp(min=1)


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

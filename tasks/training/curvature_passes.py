"""Room `tasks`: what a plan's curvature needs recorded while a stage trains, beside the contributions."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from secateur.errors import PlanError
from secateur.influence.hessian import compute_hessian
from secateur.influence.recorder import Recorder
from secateur.tasks.data.batches import seed_for
from secateur.tasks.plan import FisherConfig, HessianConfig
from secateur.tasks.training.loop import MicroBatch, TrainingLoop


def record_curvature(
    recorder: Recorder, loop: TrainingLoop, ahead: range, done: int, recorded: bool
) -> None:
    """Records what the step `ahead.start` needs, before it is taken.

    Args:
        ahead: the steps from this one to the segment's end.
        done: steps of the segment that were taken.
        recorded: whether this step's contributions are recorded.
    """
    spec = loop.run.plan.curvature
    if isinstance(spec, HessianConfig) and done % spec.every == 0:
        recorder.hessian(_hessian(recorder, loop, spec, ahead[: spec.every]))
    if isinstance(spec, FisherConfig) and recorded:
        _sampled(recorder, loop, ahead.start)


def _hessian(recorder: Recorder, loop: TrainingLoop, spec: HessianConfig, steps: range) -> Tensor:
    """The Hessian now, of the mean loss of some coming steps; of an even choice of their samples where they are many.

    A step that online selection is yet to choose for has no part in it: it is not known what it will train on.
    """
    known = [step for step in steps if step in loop.chosen or not loop.order.selection_at(step)]
    parts = [part for step in known for part in loop.micro_batches(step)]
    rows = torch.cat([part.rows for part in parts])
    weights = torch.cat([part.weights for part in parts]) / len(known)
    chosen = torch.linspace(0, len(rows) - 1, min(len(rows), spec.samples)).round().long()
    share = weights[chosen] * (weights.sum() / weights[chosen].sum())
    torch.manual_seed(loop.order.seed(steps.start))
    size = max(len(part.rows) for part in parts)
    losses = [
        partial(_loss, loop, MicroBatch(r, loop.batch(r), w))
        for r, w in zip(rows[chosen].split(size), share.split(size), strict=True)
    ]
    spans = recorder.basis.spans if spec.coupling == "block" else [slice(0, recorder.basis.size)]
    return compute_hessian(losses, loop.model, recorder.basis, spans)


def _loss(loop: TrainingLoop, part: MicroBatch) -> Tensor:
    losses = loop.task.losses(loop.model, part.tensors)
    return (losses * part.weights.to(losses)).sum()


def _sampled(recorder: Recorder, loop: TrainingLoop, step: int) -> None:
    """Contributions of a step's samples, with labels drawn from the model.

    Raises:
        PlanError: the task cannot draw labels.
    """
    draw = getattr(loop.task, "sampled", None)
    if draw is None:
        raise PlanError(
            f"`curvature: {{kind: fisher}}` needs a method sampled(model, batch) on {loop.run.plan.task.factory}, which "
            f"gives the batch with labels drawn from the model"
        )
    torch.manual_seed(seed_for(loop.order.seed(step), "fisher"))
    for part in loop.micro_batches(step):
        with torch.no_grad():
            drawn = draw(loop.model, part.tensors)
        recorder.sampled(partial(loop.task.losses, loop.model, drawn), part.weights)

"""The gradient of every target sample at a stage's end, and the targets' losses there."""

from __future__ import annotations

from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor

from secateur.influence.hooks import sample_gradients
from secateur.storage.attempt import Attempt
from secateur.storage.ledger import read_checkpoint
from secateur.storage.shards import Samples
from secateur.storage.tensors import write_tensors
from secateur.tasks.data.held_out import held_out_rows
from secateur.tasks.data.samples import list_target_samples, read_stage_samples
from secateur.tasks.engine.progress import track
from secateur.tasks.results.training_results import end_checkpoint
from secateur.tasks.results.valuation_results import GRADIENTS, SQUARED_NORM
from secateur.tasks.run import Run
from secateur.tasks.training.loop import TrainingLoop, eval_mode
from secateur.tasks.training.pass_size import split_by_memory

FIRST_PASS = 3  # samples, which is as many as the search for where to capture tells apart


def write_target_gradients(run: Run, stage: int) -> dict[str, dict[str, float]]:
    """Write each target sample's loss gradient at the stage's end, in the run's basis.

    With them goes the squared norm of their mean in all parameters, of which the basis holds a
    share.

    Returns:
        For every target the mean `loss` and the means of the task's metrics over its held-out
        samples (over all if none are held out), and how many `samples` these are.

    Raises:
        PlanError: a target is empty, or too small to be split.
    """

    def write(attempt: Attempt) -> None:
        loop = loop_at_stage_end(run, stage)
        for name in run.plan.targets:
            samples = list_target_samples(run, name)
            gradients, metrics = _differentiate_target(loop, samples, name)
            mean = mean_gradient(loop, samples, torch.arange(len(samples)))
            tensors = {GRADIENTS: gradients, SQUARED_NORM: squared_norm(mean)}
            write_tensors(attempt, f"{name}.safetensors", tensors, {})
            attempt.facts[name] = metrics

    inputs = {"basis": run.folder.basis.fingerprint}
    return dict(run.folder.stage(stage).targets.write_once("targets", inputs, write).facts)


def target_loss(loop: TrainingLoop, samples: Samples, rows: Int[Tensor, " rows"]) -> float:
    """Return the mean loss of some target samples with the loop's weights, summed in float64."""

    def losses(part: Int[Tensor, " m"]) -> Float[Tensor, " m"]:
        return loop.losses(loop.batch(part, samples))

    total = 0.0
    with eval_mode(loop.model), torch.no_grad():
        for part in split_by_memory(loop.run.plan, samples, rows, losses):
            total += float(losses(part).double().sum())
    return total / len(rows)


def loop_at_stage_end(run: Run, stage: int) -> TrainingLoop:
    """Return the stage's loop with the weights of its end."""
    loop = TrainingLoop(run, stage, read_stage_samples(run, stage))
    loop.load_state(read_checkpoint(end_checkpoint(run, stage)), optimizer=False)
    return loop


def split_for_gradients(
    loop: TrainingLoop, samples: Samples, rows: Int[Tensor, " n"]
) -> list[Int[Tensor, " m"]]:
    """Split rows into passes of `differentiate_samples` that the plan's memory allows.

    A loop's first pass also finds where to capture, for which several others are run. So a first
    one is made that is not measured.
    """
    run_pass = partial(differentiate_samples, loop, samples, check=False)
    run_pass(rows[:FIRST_PASS])
    return split_by_memory(loop.run.plan, samples, rows, run_pass)


def differentiate_samples(
    loop: TrainingLoop, samples: Samples, rows: Int[Tensor, " n"], check: bool = True
) -> tuple[Float[Tensor, "n p"], Float[Tensor, " n"], dict[str, Tensor]]:
    """Return the loss gradients of some samples in the run's basis, their losses and metrics.

    The model is in eval mode. Unless `check` is false, a few samples are also run alone, and their
    gradients are compared. Metrics are those of the task's optional `metrics` method.
    """
    with eval_mode(loop.model):
        batch = loop.batch(rows, samples)
        losses_of = loop.losses_of(batch)
        gradients, losses = sample_gradients(losses_of, len(rows), loop.bindings, loop.basis, check)
        metrics: dict[str, Tensor] = {}
        if hasattr(loop.task, "metrics"):
            with torch.no_grad(), loop.precision():
                metrics = loop.task.metrics(loop.model, batch)
    return gradients.cpu(), losses.cpu(), metrics


def mean_gradient(
    loop: TrainingLoop, samples: Samples, rows: Int[Tensor, " n"]
) -> dict[str, Tensor]:
    """Return the gradient of some samples' mean loss with the loop's weights, in all parameters.

    The model is in eval mode.
    """
    parameters = {name: p for name, p in loop.model.named_parameters() if p.requires_grad}

    def gradients(part: Int[Tensor, " m"]) -> tuple[Tensor, ...]:
        losses = loop.losses(loop.batch(part, samples))
        mean = losses.sum() / len(rows)
        return torch.autograd.grad(mean, list(parameters.values()), materialize_grads=True)

    total = [torch.zeros_like(p) for p in parameters.values()]
    with eval_mode(loop.model):
        for part in split_by_memory(loop.run.plan, samples, rows, gradients):
            for sum_so_far, gradient in zip(total, gradients(part), strict=True):
                sum_so_far += gradient
    return dict(zip(parameters, total, strict=True))


def squared_norm(gradient: dict[str, Tensor]) -> Float[Tensor, ""]:
    """Return the squared norm of a gradient in all parameters, in float64."""
    return torch.stack([g.double().square().sum().cpu() for g in gradient.values()]).sum()


def _differentiate_target(
    loop: TrainingLoop, samples: Samples, target: str
) -> tuple[Tensor, dict[str, float]]:
    """All gradients of a target, and the means of its losses and metrics if held out."""
    chunks = split_for_gradients(loop, samples, torch.arange(len(samples)))
    gradients: list[Tensor] = []
    values = []
    for rows in track(chunks, f"target {target}", len(chunks)):
        chunk, losses, metrics = differentiate_samples(loop, samples, rows, check=not gradients)
        gradients.append(chunk)
        metrics = {name: value.double().cpu() for name, value in metrics.items()}
        values.append({"loss": losses.double()} | metrics)
    reported = held_out_rows(loop.run.plan, target, len(samples))
    if not len(reported):
        reported = torch.arange(len(samples))
    means = {
        name: float(torch.cat([value[name] for value in values])[reported].mean())
        for name in values[0]
    }
    return torch.cat(gradients), {"samples": len(reported), **means}

"""Room `tasks`: the gradient of every target sample at a stage's end, and the targets' losses there."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from secateur.influence.hooks import sample_gradients
from secateur.storage.ledger import read_checkpoint
from secateur.storage.outputs import Output
from secateur.storage.shards import Samples
from secateur.storage.tensors import read_tensors, write_tensors
from secateur.tasks.data.samples import (
    held_out_rows,
    list_target_samples,
    read_stage_samples,
    scoring_rows,
)
from secateur.tasks.engine.prefect_task import pipeline_task
from secateur.tasks.engine.progress import track
from secateur.tasks.run.run import Run
from secateur.tasks.training.loop import TrainingLoop, collate, eval_mode
from secateur.tasks.training.train import end_checkpoint

EVALUATION_BATCH = 256


@pipeline_task(
    "differentiate targets", makes=lambda run, stage: run.folder.stage(stage).targets, draws=True
)
def write_target_gradients(run_url: str, stage: int) -> dict[str, dict[str, float]]:
    """Stores each target sample's loss gradient in the run's basis, at the stage's end.

    Returns:
        For every target the mean `loss` and the means of the task's metrics over the samples that judge (all where none
        is kept for that), and how many `samples` these are.

    Raises:
        PlanError: a target is empty, or too small to be split.
    """
    run = Run.open(run_url)
    artefact = run.folder.stage(stage).targets
    if not artefact.committed:
        loop = loop_at_stage_end(run, stage)
        with artefact.attempt("targets", {"basis": run.folder.basis.fingerprint}) as attempt:
            for name in run.plan.targets:
                samples = list_target_samples(run, name)
                rows, figures = _differentiate(loop, samples, name)
                write_tensors(attempt, f"{name}.safetensors", {"gradients": rows}, {})
                attempt.facts[name] = figures
    return dict(artefact.manifest.facts)


def target_loss(loop: TrainingLoop, samples: Samples, rows: Tensor) -> float:
    """Mean loss of some of a target's samples with the loop's weights, averaged in float64."""
    total = 0.0
    with eval_mode(loop.model), torch.no_grad():
        for part in rows.split(EVALUATION_BATCH):
            total += float(loop.task.losses(loop.model, loop.batch(part, samples)).double().sum())
    return total / len(rows)


def loop_at_stage_end(run: Run, stage: int) -> TrainingLoop:
    """The stage's loop with the weights of its end."""
    loop = TrainingLoop(run, stage, read_stage_samples(run, stage))
    loop.restore(read_checkpoint(end_checkpoint(run, stage)))
    return loop


def read_target_gradients(artefact: Output, name: str) -> Tensor:
    """`samples p`: the stored gradients of a target's samples."""
    return read_tensors(artefact, f"{name}.safetensors")["gradients"]


def read_scoring_gradients(run: Run, stage: int, name: str) -> Tensor:
    """`samples p`: the stored gradients of those of a target's samples that score."""
    gradients = read_target_gradients(run.folder.stage(stage).targets, name)
    return gradients[scoring_rows(run.plan, name, len(gradients))]


def differentiate_samples(
    loop: TrainingLoop, samples: Samples, rows: Tensor
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Loss gradients of some samples in the run's basis, their losses, and the task's metrics of each."""
    bindings = loop.run.bindings(loop.model)
    basis = loop.run.basis(bindings)
    with eval_mode(loop.model):
        batch = collate(loop.task, samples, rows, loop.run.plan.device)
        forward: Callable[[], Tensor] = lambda: loop.task.losses(loop.model, batch)  # noqa: E731
        numbers, losses = sample_gradients(forward, len(rows), bindings, basis)
        metrics: dict[str, Tensor] = {}
        if hasattr(loop.task, "metrics"):
            with torch.no_grad():
                metrics = loop.task.metrics(loop.model, batch)
    return numbers.cpu(), losses.cpu(), metrics


def _differentiate(
    loop: TrainingLoop, samples: Samples, name: str
) -> tuple[Tensor, dict[str, float]]:
    """All of a target's gradients, and the means of its losses and metrics over the samples that judge."""
    judges = held_out_rows(loop.run.plan, name, len(samples))
    chunks = torch.arange(len(samples)).split(EVALUATION_BATCH)
    gradients, values = [], []
    for rows in track(chunks, f"target {name}", len(chunks)):
        numbers, losses, metrics = differentiate_samples(loop, samples, rows)
        gradients.append(numbers)
        values.append({"loss": losses.double()} | {k: v.double().cpu() for k, v in metrics.items()})
    told = judges if len(judges) else torch.arange(len(samples))
    means = {key: float(torch.cat([v[key] for v in values])[told].mean()) for key in values[0]}
    return torch.cat(gradients), {"samples": len(told), **means}

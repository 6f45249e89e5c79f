"""TracIn scores: the targets' gradients at every segment checkpoint, and their products."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from secateur.influence.baselines import tracin_scores
from secateur.storage.attempt import Attempt
from secateur.storage.ledger import read_checkpoint
from secateur.storage.shards import Samples
from secateur.storage.tensors import read_tensors, write_tensors
from secateur.tasks.data.held_out import scoring_rows
from secateur.tasks.data.samples import list_target_samples, read_stage_samples
from secateur.tasks.engine.progress import track
from secateur.tasks.results.training_results import check_checkpoints, start_checkpoint
from secateur.tasks.run import Run
from secateur.tasks.training.loop import TrainingLoop
from secateur.tasks.training.optimizers import plan_update_rule
from secateur.tasks.valuation.dynamics import read_segment
from secateur.tasks.valuation.target_gradients import differentiate_samples, split_for_gradients

GRADIENTS = "gradients.safetensors"


def stage_tracin_scores(run: Run, stage: int) -> Float[Tensor, "uses targets"]:
    """Return the TracIn score of every recorded use, ordered as the stage's scores are.

    The gradients that they need are computed and stored if they are missing.
    """
    differentiate_checkpoints(run, stage)
    segments = run.folder.stage(stage).segments()
    update_rule = plan_update_rule(run.plan.optimizer)
    gradients = [_read_gradients(run, stage, number) for number in range(len(segments) + 1)]
    parts = []
    for number, ledger in enumerate(segments):
        segment = read_segment(ledger)
        scores = tracin_scores(segment, update_rule, gradients[number], gradients[number + 1])
        parts.append(scores[segment.selected])
    return torch.cat(parts)


def differentiate_checkpoints(run: Run, stage: int) -> None:
    """Store the gradient of each target's mean loss at every segment checkpoint of a stage.

    Raises:
        PlanError: some of the checkpoints are removed.
    """
    folder = run.folder.stage(stage)
    segments = folder.segments()
    missing = [n for n in range(len(segments) + 1) if not folder.gradients(n).committed]
    if not missing:
        return
    check_checkpoints(run, stage)
    loop = TrainingLoop(run, stage, read_stage_samples(run, stage))
    targets = {name: list_target_samples(run, name) for name in run.plan.targets}
    label = f"stage {stage}, targets at checkpoints"
    for number in track(missing, label, len(missing)):
        checkpoint = segments[number - 1] if number else start_checkpoint(run, stage)
        loop.load_state(read_checkpoint(checkpoint), optimizer=False)
        _commit_gradients(run, loop, stage, number, targets)


def _commit_gradients(
    run: Run, loop: TrainingLoop, stage: int, number: int, targets: dict[str, Samples]
) -> None:
    def write(attempt: Attempt) -> None:
        means = {}
        for name, samples in targets.items():
            rows = split_for_gradients(loop, samples, scoring_rows(run.plan, name, len(samples)))
            parts = [differentiate_samples(loop, samples, part)[0] for part in rows]
            means[name] = torch.cat(parts).double().mean(0)
        write_tensors(attempt, GRADIENTS, means, {})

    inputs = {"basis": run.folder.basis.fingerprint}
    run.folder.stage(stage).gradients(number).write_once("target gradients", inputs, write)


def _read_gradients(run: Run, stage: int, number: int) -> Float[Tensor, "targets p"]:
    """The targets' gradients at a checkpoint, in the order of the plan's targets."""
    stored = read_tensors(run.folder.stage(stage).gradients(number), GRADIENTS)
    return torch.stack([stored[name] for name in run.plan.targets])

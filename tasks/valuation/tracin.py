"""Room `tasks`: the scores that a policy reads; for TracIn the targets' gradients at every segment checkpoint too."""

from __future__ import annotations

import polars as pl
import torch
from torch import Tensor

from secateur.influence.baselines import tracin_scores
from secateur.storage.ledger import read_checkpoint
from secateur.storage.tensors import read_tensors, write_tensors
from secateur.tasks.data.samples import list_target_samples, read_stage_samples, scoring_rows
from secateur.tasks.engine.progress import track
from secateur.tasks.plan import Policy, TracInPolicy
from secateur.tasks.run.run import Run
from secateur.tasks.training.loop import TrainingLoop
from secateur.tasks.training.optimizer import plan_update_rule
from secateur.tasks.training.train import start_checkpoint
from secateur.tasks.valuation.embed import segment_of
from secateur.tasks.valuation.score import read_scores
from secateur.tasks.valuation.target_gradients import EVALUATION_BATCH, differentiate_samples

FILE = "gradients.safetensors"


def read_policy_scores(run: Run, stage: int, policy: Policy) -> pl.DataFrame:
    """The stage's `scores.parquet`, for TracIn with a column `tracin_<target>` for every target."""
    scores = read_scores(run, stage)
    if not isinstance(policy, TracInPolicy):
        return scores
    found = _tracin(run, stage)
    columns = zip(run.plan.targets, found.unbind(1), strict=True)
    return scores.with_columns(
        pl.Series(f"tracin_{name}", values.numpy()) for name, values in columns
    )


def _tracin(run: Run, stage: int) -> Tensor:
    """`uses targets`, in the order of the stage's scores."""
    differentiate_checkpoints(run, stage)
    folder, optimizer = run.folder.stage(stage), plan_update_rule(run.plan.optimizer)
    at = [_gradients(run, stage, number) for number in range(len(folder.segments()) + 1)]
    parts = []
    for number, ledger in enumerate(folder.segments()):
        segment = segment_of(ledger)
        parts.append(
            tracin_scores(segment, optimizer, at[number], at[number + 1])[segment.selected]
        )
    return torch.cat(parts)


def differentiate_checkpoints(run: Run, stage: int) -> None:
    """Stores the gradient of each target's mean loss, in the run's basis, at every segment checkpoint of a stage."""
    folder = run.folder.stage(stage)
    segments = folder.segments()
    missing = [n for n in range(len(segments) + 1) if not folder.gradients(n).committed]
    if not missing:
        return
    loop = TrainingLoop(run, stage, read_stage_samples(run, stage))
    targets = {name: list_target_samples(run, name) for name in run.plan.targets}
    for number in track(missing, f"stage {stage}, targets at checkpoints", len(missing)):
        checkpoint = segments[number - 1] if number else start_checkpoint(run, stage)
        loop.restore(read_checkpoint(checkpoint), optimizer=False)
        means = {}
        for name, samples in targets.items():
            rows = scoring_rows(run.plan, name, len(samples)).split(EVALUATION_BATCH)
            means[name] = (
                torch.cat([differentiate_samples(loop, samples, part)[0] for part in rows])
                .double()
                .mean(0)
            )
        with folder.gradients(number).attempt(
            "target gradients", {"basis": run.folder.basis.fingerprint}
        ) as attempt:
            write_tensors(attempt, FILE, means, {})


def _gradients(run: Run, stage: int, number: int) -> Tensor:
    """`targets p`, in the order of the plan's targets."""
    stored = read_tensors(run.folder.stage(stage).gradients(number), FILE)
    return torch.stack([stored[name] for name in run.plan.targets])

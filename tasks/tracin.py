"""Room `tasks`: the scores that a policy reads; for TracIn the targets' gradients at every segment checkpoint too."""

from __future__ import annotations

import polars as pl
import torch
from torch import Tensor

from secateur.baselines import tracin
from storage.ledger import read_checkpoint
from storage.tensors import read_tensors, write_tensors
from tasks.embed import segment_of
from tasks.loop import Loop
from tasks.optimizer import linearised
from tasks.plan import Policy, TracIn
from tasks.progress import track
from tasks.run import Run
from tasks.samples import scoring_rows, stage_samples, target_samples
from tasks.score import stage_scores
from tasks.targets import EVALUATION_BATCH, gradients_of
from tasks.train import start_checkpoint

FILE = "gradients.safetensors"


def policy_scores(run: Run, stage: int, policy: Policy) -> pl.DataFrame:
    """The stage's `scores.parquet`, for TracIn with a column `tracin_<target>` for every target."""
    scores = stage_scores(run, stage)
    if not isinstance(policy, TracIn):
        return scores
    found = _tracin(run, stage)
    columns = zip(run.plan.targets, found.unbind(1), strict=True)
    return scores.with_columns(pl.Series(f"tracin_{name}", values.numpy()) for name, values in columns)


def _tracin(run: Run, stage: int) -> Tensor:
    """`uses targets`, in the order of the stage's scores."""
    differentiate_checkpoints(run, stage)
    folder, optimizer = run.folder.stage(stage), linearised(run.plan.optimizer)
    at = [_gradients(run, stage, number) for number in range(len(folder.segments()) + 1)]
    parts = []
    for number, ledger in enumerate(folder.segments()):
        segment = segment_of(ledger)
        parts.append(tracin(segment, optimizer, at[number], at[number + 1])[segment.selected])
    return torch.cat(parts)


def differentiate_checkpoints(run: Run, stage: int) -> None:
    """Stores the gradient of each target's mean loss, in the run's basis, at every segment checkpoint of a stage."""
    folder = run.folder.stage(stage)
    segments = folder.segments()
    missing = [n for n in range(len(segments) + 1) if not folder.gradients(n).committed]
    if not missing:
        return
    loop = Loop(run, stage, stage_samples(run, stage))
    targets = {name: target_samples(run, name) for name in run.plan.targets}
    for number in track(missing, f"stage {stage}, targets at checkpoints", len(missing)):
        checkpoint = segments[number - 1] if number else start_checkpoint(run, stage)
        loop.restore(read_checkpoint(checkpoint), optimizer=False)
        means = {}
        for name, samples in targets.items():
            rows = scoring_rows(run.plan, name, len(samples)).split(EVALUATION_BATCH)
            means[name] = torch.cat([gradients_of(loop, samples, part)[0] for part in rows]).double().mean(0)
        with folder.gradients(number).attempt("target gradients", {"basis": run.folder.basis.fingerprint}) as attempt:
            write_tensors(attempt, FILE, means, {})


def _gradients(run: Run, stage: int, number: int) -> Tensor:
    """`targets p`, in the order of the plan's targets."""
    stored = read_tensors(run.folder.stage(stage).gradients(number), FILE)
    return torch.stack([stored[name] for name in run.plan.targets])

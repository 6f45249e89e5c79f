"""What the pruning studies share: a first stage through the tool, and second stages from memory on what each arm keeps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
import torch
from jaxtyping import Int
from torch import Tensor, nn

from secateur.storage.ledger import read_checkpoint
from secateur.storage.shards import Samples
from secateur.tasks.data.samples import list_stage_samples, read_stage_samples
from secateur.tasks.plan import Plan
from secateur.tasks.run.run import Run
from secateur.tasks.training.fit_basis import fit_basis
from secateur.tasks.training.loop import Tensors, TrainingLoop, collate, eval_mode
from secateur.tasks.training.train import end_checkpoint, train_stage
from secateur.tasks.valuation.embed import compose_stage, embed_segment
from secateur.tasks.valuation.replay import replay_stage
from secateur.tasks.valuation.score import write_scores
from secateur.tasks.valuation.target_gradients import write_target_gradients


def first_stage(plan: Plan) -> Run:
    """The run with its first stage trained, embedded and scored; what is there already is taken as it is."""
    run = Run.start(plan)
    stage_through_scores(run, 0)
    return run


def stage_through_scores(run: Run, stage: int) -> None:
    """Trains, embeds and scores a stage, by replay where the plan says so."""
    list_stage_samples.fn(run.url, stage)
    if stage == 0:
        fit_basis.fn(run.url)
    train_stage.fn(run.url, stage)
    for number in range(len(run.folder.stage(stage).segments())):
        embed_segment.fn(run.url, stage, number)
    compose_stage.fn(run.url, stage)
    write_target_gradients.fn(run.url, stage)
    if run.plan.estimate == "replay":
        replay_stage.fn(run.url, stage)
    write_scores.fn(run.url, stage)


class Held(TrainingLoop):
    """A loop over samples that were decoded beforehand."""

    def __init__(self, run: Run, stage: int, samples: Samples, tensors: Tensors) -> None:
        super().__init__(run, stage, samples)
        self._tensors = tensors

    def batch(self, rows: Int[Tensor, " batch"], samples: Samples | None = None) -> Tensors:
        """The rows of what was decoded."""
        return {name: held[rows] for name, held in self._tensors.items()}


@dataclass(frozen=True)
class Arms:
    """A run whose first stage is trained, and its decoded samples: where every arm begins."""

    run: Run
    samples: Samples
    tensors: Tensors

    @staticmethod
    def of(run: Run) -> Arms:
        """With the first stage's samples."""
        samples = read_stage_samples(run, 0)
        return Arms(run, samples, decoded(run, samples))

    def second_stage(self, keep: np.ndarray) -> nn.Module:
        """The model after the plan's second stage on some of the first one's samples: as many steps for every arm."""
        chosen = Samples(self.samples.urls, self.samples.frame.filter(pl.Series(keep)))
        held = {name: t[torch.from_numpy(keep)] for name, t in self.tensors.items()}
        loop = Held(self.run, 1, chosen, held)
        loop.restore(read_checkpoint(end_checkpoint(self.run, 0)), optimizer=False)
        for step in range(loop.order.steps):
            loop.step(step)
        return loop.model


def decoded(run: Run, samples: Samples) -> Tensors:
    """All of some samples as the task's tensors."""
    parts = [
        collate(run.task(), samples, rows, "cpu") for rows in torch.arange(len(samples)).split(512)
    ]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def judged(run: Run, model: nn.Module, tensors: Tensors) -> dict[str, float]:
    """Mean loss of decoded samples, and the means of the task's metrics."""
    task: Any = run.task()
    values: dict[str, list[Tensor]] = {}
    size = len(next(iter(tensors.values())))
    with eval_mode(model), torch.no_grad():
        for rows in torch.arange(size).split(512):
            batch = {name: t[rows] for name, t in tensors.items()}
            found = {"loss": task.losses(model, batch)}
            if hasattr(task, "metrics"):
                found |= task.metrics(model, batch)
            for name, value in found.items():
                values.setdefault(name, []).append(value.double())
    return {name: float(torch.cat(parts).mean()) for name, parts in values.items()}


def best(scores: np.ndarray, fraction: float) -> np.ndarray:
    """Which samples are among the best-scored fraction."""
    keep = np.zeros(len(scores), bool)
    keep[np.argsort(-scores, kind="stable")[: round(fraction * len(scores))]] = True
    return keep

"""A scored first stage, and second stages on what each arm keeps, for the pruning studies."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
import torch
from jaxtyping import Int
from torch import Tensor, nn

from secateur.flows.stage import score_stage, train_stage
from secateur.flows.workers import InlineWorkers
from secateur.storage.ledger import read_checkpoint
from secateur.storage.shards import Samples
from secateur.tasks.data.collate import Tensors, collate
from secateur.tasks.data.samples import read_stage_samples
from secateur.tasks.plan import Plan
from secateur.tasks.results.training_results import end_checkpoint
from secateur.tasks.run import Run
from secateur.tasks.training.loop import TrainingLoop, eval_mode

BATCH = 512  # samples that are decoded or evaluated together


def start_scored(plan: Plan) -> Run:
    """Start a plan's run, and train and score its first stage. Existing outputs are used."""
    run = Run.start(plan)
    train_and_score(run, 0)
    return run


def train_and_score(run: Run, stage: int) -> None:
    """Train and score a stage as the flows do, in this process and without Prefect."""
    workers = InlineWorkers()
    train_stage(workers, run.url, stage)
    score_stage(workers, run.url, stage)


class InMemoryLoop(TrainingLoop):
    """A training loop over samples that were decoded before."""

    def __init__(self, run: Run, stage: int, samples: Samples, tensors: Tensors) -> None:
        super().__init__(run, stage, samples)
        self._tensors = tensors

    def batch(self, rows: Int[Tensor, " batch"], samples: Samples | None = None) -> Tensors:
        """Return some rows of the decoded samples."""
        return {name: tensor[rows] for name, tensor in self._tensors.items()}


@dataclass(frozen=True)
class Arms:
    """A run whose first stage is trained, and its decoded samples. Every arm starts from it."""

    run: Run
    samples: Samples
    tensors: Tensors

    @staticmethod
    def of_run(run: Run) -> Arms:
        """Read and decode the first stage's samples."""
        samples = read_stage_samples(run, 0)
        return Arms(run, samples, decode_samples(run, samples))

    def train_second_stage(self, keep: np.ndarray) -> nn.Module:
        """Train the plan's second stage on some of the first one's samples, and return the model.

        Every arm takes the same number of steps.
        """
        kept = Samples(self.samples.urls, self.samples.frame.filter(pl.Series(keep)))
        rows = torch.from_numpy(keep)
        tensors = {name: tensor[rows] for name, tensor in self.tensors.items()}
        loop = InMemoryLoop(self.run, 1, kept, tensors)
        loop.load_state(read_checkpoint(end_checkpoint(self.run, 0)), optimizer=False)
        for step in range(loop.schedule.steps):
            loop.step(step)
        return loop.model


def decode_samples(run: Run, samples: Samples) -> Tensors:
    """Return all of some samples as the task's tensors."""
    chunks = torch.arange(len(samples)).split(BATCH)
    parts = [collate(run.task(), samples, rows, "cpu") for rows in chunks]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def evaluate(run: Run, model: nn.Module, tensors: Tensors) -> dict[str, float]:
    """Return the mean loss of decoded samples, and the means of the task's metrics."""
    task: Any = run.task()
    values: dict[str, list[Tensor]] = {}
    size = len(next(iter(tensors.values())))
    with eval_mode(model), torch.no_grad():
        for rows in torch.arange(size).split(BATCH):
            batch = {name: tensor[rows] for name, tensor in tensors.items()}
            figures = {"loss": task.losses(model, batch)}
            if hasattr(task, "metrics"):
                figures |= task.metrics(model, batch)
            for name, value in figures.items():
                values.setdefault(name, []).append(value.double())
    return {name: float(torch.cat(parts).mean()) for name, parts in values.items()}


def mark_best(scores: np.ndarray, fraction: float) -> np.ndarray:
    """Return which samples are among the fraction with the best scores."""
    keep = np.zeros(len(scores), bool)
    keep[np.argsort(-scores, kind="stable")[: round(fraction * len(scores))]] = True
    return keep

"""Scores of every recorded use for one question, by replay of the stages' training."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from secateur.influence.tape import Adjoint
from secateur.tasks.data.samples import read_stage_samples
from secateur.tasks.results.training_results import check_replayable
from secateur.tasks.run import Run
from secateur.tasks.training.loop import TrainingLoop
from secateur.tasks.training.segments import segment_bounds
from secateur.tasks.valuation.question import Question
from secateur.tasks.valuation.replay import start_adjoint, walk_back

NAME = "question"


def replay_scores(
    run: Run, stages: list[int], question: Question
) -> Iterator[tuple[int, Float[Tensor, " uses"]]]:
    """Yield each stage and the scores of its uses, the last stage first.

    Uses are in the order of `scores.parquet`. Nothing is stored.

    Args:
        stages: consecutive stages. The question is about the end of the last one.

    Raises:
        PlanError: a stage's training cannot be repeated (see `replay_stage`).
    """
    for stage in stages:
        check_replayable(run, stage)
    adjoint: Adjoint | None = None
    for stage in reversed(stages):
        loop = TrainingLoop(run, stage, read_stage_samples(run, stage))
        if adjoint is None:
            samples = question.samples()
            rows = torch.arange(len(samples)) if question.rows is None else question.rows
            adjoint = start_adjoint(run, loop, samples, rows)
        elif run.plan.optimizer.at_stage == "reset":
            for matrix in adjoint:
                matrix[1:] = 0
        parts = []
        bounds = segment_bounds(loop.schedule)
        for number in reversed(range(len(bounds))):
            scores, adjoints = walk_back(run, loop, number, bounds[number], {NAME: adjoint})
            adjoint = adjoints[NAME]
            parts.append(scores[NAME])
        yield stage, torch.cat(parts[::-1])

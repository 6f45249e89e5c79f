"""Replays of a stage for the questions by which its answers are compared, and what they cost."""

from __future__ import annotations

from functools import partial

import torch
from jaxtyping import Int
from torch import Tensor

from secateur.errors import PlanError
from secateur.storage.shards import Samples
from secateur.tasks.analysis.retraining import FURTHER_REPLAY_COST, REPLAY_COST
from secateur.tasks.data.samples import list_target_samples
from secateur.tasks.run import Run
from secateur.tasks.valuation.drawn_questions import DrawnQuestion, draw_questions
from secateur.tasks.valuation.replay import Ask, replay_questions


def replay_drawn(run: Run, stage: int, questions: int, numbers: list[int] | None = None) -> int:
    """Replay a stage for some of so many drawn questions, by number; for all if None.

    Returns:
        Number of segments.

    Raises:
        PlanError: the targets have fewer samples, the plan's precision does not allow replay,
            another trainer trained the stage, or training does not repeat itself.
    """
    if run.plan.is_half_precise:
        raise PlanError(
            f"{run.url} was trained in half precision, which cannot hold the differences that "
            f"replay takes; compare answers in a run that trains in float32"
        )
    drawn = draw_questions(run, questions)
    chosen = drawn if numbers is None else [drawn[number] for number in numbers]
    asked: dict[str, Ask] = {one.name: partial(sample_asked, run, one) for one in chosen}
    return replay_questions(run, stage, asked)


def remaining_questions(run: Run, stage: int, questions: int) -> list[int]:
    """Return the numbers of the questions that a stage has yet to be replayed for."""
    folder = run.folder.stage(stage)
    if folder.agreement.committed:
        return []
    drawn = draw_questions(run, questions)
    return [n for n, one in enumerate(drawn) if not folder.replay(one.name, 0).committed]


def expected_agreement_cost(questions: int) -> float:
    """Return what it costs to ask a stage so many questions, in trainings of the stage."""
    return REPLAY_COST + FURTHER_REPLAY_COST * (questions - 1)


def sample_asked(run: Run, question: DrawnQuestion) -> tuple[Samples, Int[Tensor, "1"]]:
    """Return the samples of a question's target, and the place of the one asked about."""
    return list_target_samples(run, question.target), torch.tensor([question.row])

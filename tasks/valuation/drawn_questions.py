"""The questions by which a run measures how far its answers agree with replay."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import cycle, islice

import torch

from secateur.errors import PlanError
from secateur.tasks.data.samples import list_target_samples
from secateur.tasks.data.seeds import seed_for
from secateur.tasks.run import Run

QUESTION = "question-"  # how the names of questions begin; no target has a dash in its name


@dataclass(frozen=True)
class DrawnQuestion:
    """A question about the loss of one target sample.

    Attributes:
        name: of its replays.
        target: the target.
        row: the sample's place among the target's samples.
        key: of the sample.
    """

    name: str
    target: str
    row: int
    key: str


def draw_questions(run: Run, count: int) -> list[DrawnQuestion]:
    """Draw the target samples that are asked about, the same at every stage.

    The targets take turns. Within each, samples are drawn at random without repetition. A larger
    number adds questions after the same first ones.

    Raises:
        PlanError: the targets have fewer samples.
    """
    samples = {name: list_target_samples(run, name) for name in run.plan.targets if count}
    total = sum(map(len, samples.values()))
    if count > total:
        raise PlanError(
            f"{count} questions are to be asked (trust.questions) and the targets have {total} "
            f"samples, each of which can be asked about once; ask fewer, or give a target more"
        )
    drawn = {name: iter(_shuffle(run, name, len(found))) for name, found in samples.items()}
    places = ((name, row) for name in cycle(drawn) if (row := next(drawn[name], None)) is not None)
    return [
        DrawnQuestion(f"{QUESTION}{number:04d}", name, row, samples[name].keys([row])[0])
        for number, (name, row) in enumerate(islice(places, count))
    ]


def _shuffle(run: Run, target: str, count: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed_for(run.plan.seed, "questions", target))
    order: list[int] = torch.randperm(count, generator=generator).tolist()
    return order

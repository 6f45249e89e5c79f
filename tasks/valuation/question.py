"""What a query is about: the mean loss of a target's samples, or the loss of one sample."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import polars as pl
import torch
from jaxtyping import Float, Int
from torch import Tensor

from secateur.errors import PlanError
from secateur.storage.shards import Samples
from secateur.tasks.data.samples import list_target_samples, read_stage_samples
from secateur.tasks.results.valuation_results import read_target_gradients
from secateur.tasks.run import Run
from secateur.tasks.valuation.target_gradients import differentiate_samples, loop_at_stage_end


@dataclass(frozen=True)
class Question:
    """Samples whose mean loss is asked about.

    Attributes:
        samples: reads the samples that they are among.
        rows: their places there; None for all.
        target: the name of the target that they are of, if they are of one.
    """

    samples: Callable[[], Samples]
    rows: Int[Tensor, " n"] | None
    target: str | None


def find_question(run: Run, target: str | None, sample: str | None) -> Question:
    """Return the question about a target, by its name, or about a sample, by its key.

    A sample is sought among the targets first, then among the first stage's samples.

    Raises:
        PlanError: neither or both are given, or the one given is not known.
    """
    if (target is None) == (sample is None):
        raise PlanError(
            "a query is about a target or about a sample; give one of --target and --sample"
        )
    if target is not None:
        if target not in run.plan.targets:
            known = ", ".join(run.plan.targets)
            raise PlanError(f"{run.url} has no target {target}; it has {known}")
        return Question(partial(list_target_samples, run, target), None, target)
    sources = [partial(list_target_samples, run, name) for name in run.plan.targets]
    for source in (*sources, partial(read_stage_samples, run, 0)):
        found = source().frame.filter(pl.col("key") == sample)
        if len(found):
            return Question(source, torch.tensor([int(found["sample"][0])]), None)
    raise PlanError(
        f"no target and no training shard of {run.url} holds a sample {sample}; check the key"
    )


def question_gradient(run: Run, stage: int, question: Question) -> Float[Tensor, "1 p"]:
    """Return the gradient of the loss asked about at a stage's end, in the run's basis."""
    if question.target is not None:
        gradients = read_target_gradients(run, stage, question.target)
        asked = gradients if question.rows is None else gradients[question.rows]
        return asked.mean(0, keepdim=True)
    assert question.rows is not None
    loop = loop_at_stage_end(run, stage)
    return differentiate_samples(loop, question.samples(), question.rows)[0]

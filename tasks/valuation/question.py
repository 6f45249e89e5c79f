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
from secateur.tasks.results.valuation_results import read_squared_norm, read_target_gradients
from secateur.tasks.run import Run
from secateur.tasks.valuation.target_gradients import (
    differentiate_samples,
    loop_at_stage_end,
    mean_gradient,
    squared_norm,
)


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


def question_gradient(
    run: Run, stage: int, question: Question
) -> tuple[Float[Tensor, "1 p"], float | None]:
    """Return the gradient of the loss asked about at a stage's end, in the run's basis.

    Returns:
        The gradient, and the share of its squared norm that the basis holds. The share is None if
        the question is about a target, and an earlier version of this package wrote the stage.
    """
    if question.target is not None:
        gradient = read_target_gradients(run, stage, question.target).mean(0, keepdim=True)
        whole = read_squared_norm(run, stage, question.target)
        return gradient, None if whole is None else share_held(gradient, whole)
    assert question.rows is not None
    loop = loop_at_stage_end(run, stage)
    samples = question.samples()
    gradient = differentiate_samples(loop, samples, question.rows)[0]
    whole = float(squared_norm(mean_gradient(loop, samples, question.rows)))
    return gradient, share_held(gradient, whole)


def share_held(gradient: Float[Tensor, "_ p"], whole: float) -> float:
    """Return the share of a gradient's squared norm that a basis holds. Every basis is orthonormal.

    Args:
        gradient: its coefficients.
        whole: its squared norm in all parameters.
    """
    held = float(gradient.double().square().sum())
    # Rounding may take it above 1. A gradient of zero is held in full.
    return min(held / whole, 1.0) if whole else 1.0

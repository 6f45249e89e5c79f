"""Split a target's samples: some score training samples, the others are held out."""

from __future__ import annotations

import torch
from jaxtyping import Int
from torch import Tensor

from secateur.errors import PlanError
from secateur.tasks.data.seeds import seed_for
from secateur.tasks.plan import Plan


def scoring_rows(plan: Plan, target: str, count: int) -> Int[Tensor, " rows"]:
    """Return which of a target's `count` samples score training samples, in order."""
    return _split_target(plan, target, count)[1]


def held_out_rows(plan: Plan, target: str, count: int) -> Int[Tensor, " rows"]:
    """Return which of a target's `count` samples are held out, in order.

    They never score training samples. The split is the same for every seed of the plan.
    """
    return _split_target(plan, target, count)[0]


def _split_target(plan: Plan, target: str, count: int) -> tuple[Tensor, Tensor]:
    """The held-out rows and the scoring rows.

    Raises:
        PlanError: the target is too small to be split.
    """
    share = plan.held_out_share(target)
    size = round(share * count)
    if share and not 0 < size < count:
        raise PlanError(
            f"target {target} has {count} samples, too few to hold out {share:g} of them; give it "
            f"more samples, or add a target for evaluation"
        )
    # Not the plan's seed: the seeds of a comparison must be evaluated on the same samples.
    generator = torch.Generator().manual_seed(seed_for("judging", target))
    shuffled = torch.randperm(count, generator=generator)
    return shuffled[:size].sort().values, shuffled[size:].sort().values

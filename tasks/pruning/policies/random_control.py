"""A control that ignores scores."""

from __future__ import annotations

from typing import Literal

import numpy as np
import polars as pl

from secateur.tasks.plan import Fraction, Policy, register_policy
from secateur.tasks.pruning.context import PruningContext
from secateur.tasks.pruning.ranking import keep_best, rank_samples


@register_policy
class RandomPolicy(Policy):
    """Control: keeps a random fraction."""

    policy: Literal["random"] = "random"
    keep: Fraction

    def decide(self, samples: pl.DataFrame, context: PruningContext) -> pl.DataFrame:
        rng = np.random.default_rng(context.seed("random policy"))
        order = pl.Series(rng.permutation(len(samples)))
        shuffled = samples.with_columns(drawn=order)
        ranked = rank_samples(shuffled, pl.col("drawn"), descending=False)
        return keep_best(ranked, self.keep, "draw", self.policy)

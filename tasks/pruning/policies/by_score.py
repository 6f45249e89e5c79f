"""Policies that read nothing but the score."""

from __future__ import annotations

from typing import Literal

import polars as pl

from secateur.tasks.plan import Fraction, Policy, register_policy
from secateur.tasks.pruning.context import PruningContext
from secateur.tasks.pruning.ranking import keep_best, mark_kept, rank_samples


@register_policy
class TopPolicy(Policy):
    """Keeps the fraction with the best scores."""

    policy: Literal["top"] = "top"
    keep: Fraction

    def decide(self, samples: pl.DataFrame, context: PruningContext) -> pl.DataFrame:
        ranked = rank_samples(samples, pl.col("score"), descending=True)
        return keep_best(ranked, self.keep, "score", self.policy)


@register_policy
class ThresholdPolicy(Policy):
    """Keeps samples whose score is at least a given value."""

    policy: Literal["threshold"] = "threshold"
    at_least: float

    def decide(self, samples: pl.DataFrame, context: PruningContext) -> pl.DataFrame:
        ranked = rank_samples(samples, pl.col("score"), descending=True)
        reason = f"score under {self.at_least:g}"
        return mark_kept(ranked, pl.col("score") >= self.at_least, self.policy, reason)


@register_policy
class DropHarmfulPolicy(Policy):
    """Drops samples with a negative score."""

    policy: Literal["drop_harmful"] = "drop_harmful"

    def decide(self, samples: pl.DataFrame, context: PruningContext) -> pl.DataFrame:
        ranked = rank_samples(samples, pl.col("score"), descending=True)
        return mark_kept(ranked, pl.col("score") >= 0, self.policy, "score under 0")

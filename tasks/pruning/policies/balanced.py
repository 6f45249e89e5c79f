"""A policy that keeps the same fraction of every group."""

from __future__ import annotations

from typing import Literal

import polars as pl
from pydantic import Field

from secateur.tasks.plan import Fraction, Policy, register_policy
from secateur.tasks.pruning.context import PruningContext
from secateur.tasks.pruning.ranking import rank_samples


@register_policy
class BalancedPolicy(Policy):
    """Keeps the fraction with the best scores of every label or domain."""

    policy: Literal["balanced"] = "balanced"
    keep: Fraction
    by: str = Field(
        description="a member of the sample (`cls`), or a field of a JSON member (`json:domain`)"
    )

    def decide(self, samples: pl.DataFrame, context: PruningContext) -> pl.DataFrame:
        groups = pl.Series(context.group_names(self.by, samples["sample"].to_list()))
        ranked = rank_samples(samples.with_columns(group=groups), pl.col("score"), descending=True)
        rank_in_group = pl.col("rank").rank("ordinal").over("group")
        quota = (pl.len().over("group") * self.keep).round()
        dropped = pl.format("balanced: beyond the quota of {}", "group")
        reason = pl.when("keep").then(pl.lit("kept: balanced")).otherwise(dropped)
        return ranked.with_columns(keep=rank_in_group <= quota).with_columns(reason=reason)

"""Decide which samples of a stage are kept, and why."""

from __future__ import annotations

from typing import Any

import polars as pl

from secateur.errors import PlanError
from secateur.tasks.plan import Policy
from secateur.tasks.pruning.context import PruningContext
from secateur.tasks.run import Run

NOT_IN_WINDOW = "kept: not used in a window"


def decide_samples(policy: Policy, context: PruningContext) -> pl.DataFrame:
    """Return one row per sample of the stage, with the columns of `decisions.parquet`.

    The columns are `sample`, `key`, `shard`, `score`, `loss`, `uses`, `keep`, `reason` and `rank`
    (from 1, the best). Samples that were not used in a window are kept, without a rank.
    """
    recorded = (
        policy.read_scores(context)
        .sort("step", maintain_order=True)
        .group_by("sample", maintain_order=True)
        .agg(
            policy.sample_score(context).alias("score"),
            pl.col("loss", "grand", "el2n").last(),
            pl.len().cast(pl.UInt32).alias("uses"),
        )
        .sort("sample")
    )
    listed = context.samples.frame.select("sample", "key", "shard")
    ruled = policy.decide(recorded.join(listed, "sample", maintain_order="left"), context)
    columns = ("sample", "score", "loss", "uses", "keep", "reason", "rank")
    decisions = listed.join(ruled.select(columns), "sample", how="left", maintain_order="left")
    return decisions.with_columns(
        pl.col("uses").fill_null(0),
        pl.col("keep").fill_null(True),
        pl.col("reason").fill_null(NOT_IN_WINDOW),
    )


def count_decisions(decisions: pl.DataFrame) -> dict[str, Any]:
    """Return the number of samples, kept and dropped ones, and drops for each reason."""
    dropped = decisions.filter(~pl.col("keep"))
    reasons = dropped.group_by("reason").len().sort("reason")
    return {
        "samples": len(decisions),
        "kept": len(decisions) - len(dropped),
        "dropped": len(dropped),
        "reasons": dict(reasons.iter_rows()),
    }


def resolve_policy(run: Run, stage: int, policy: Policy | None) -> Policy:
    """Return the policy to prune a stage by: the one given, or the plan's.

    Raises:
        PlanError: none is given, and the plan has none for the stage.
    """
    resolved = policy or run.plan.stages[stage].prune
    if resolved is None:
        raise PlanError(f"stage {stage} of the plan has no `prune`; name a policy")
    return resolved

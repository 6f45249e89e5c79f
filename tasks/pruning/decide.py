"""Decide which samples of a stage are kept, and why."""

from __future__ import annotations

from typing import Any

import polars as pl

from secateur.errors import PlanError
from secateur.storage.schemas import DECISIONS
from secateur.tasks.plan import Policy
from secateur.tasks.pruning.context import PruningContext
from secateur.tasks.run import Run

NOT_IN_WINDOW = "kept: not used in a window"
# The columns of a policy's decisions that are stored.
RULING = {
    name: DECISIONS[name] for name in ("sample", "score", "loss", "uses", "keep", "reason", "rank")
}


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
    samples = recorded.join(listed, "sample", maintain_order="left")
    ruled = _check_ruling(policy, samples, policy.decide(samples, context))
    decisions = listed.join(ruled, "sample", how="left", maintain_order="left")
    return decisions.with_columns(
        pl.col("uses").fill_null(0),
        pl.col("keep").fill_null(True),
        pl.col("reason").fill_null(NOT_IN_WINDOW),
    )


def _check_ruling(policy: Policy, samples: pl.DataFrame, ruled: pl.DataFrame) -> pl.DataFrame:
    """The columns of a policy's decisions that are stored.

    Raises:
        PlanError: a column is missing or of another type, or a sample is missing or repeated. A
            missing one would be kept without a word.
    """
    rule = f"the policy {policy.policy} ({type(policy).__module__}.{type(policy).__qualname__})"
    missing = [name for name in RULING if name not in ruled.columns]
    if missing:
        raise PlanError(
            f"{rule} returned no column {missing[0]}; `decide` must return the samples it was "
            f"given, with `keep`, `reason` and `rank`"
        )
    if sorted(ruled["sample"].to_list()) != sorted(samples["sample"].to_list()):
        raise PlanError(
            f"{rule} returned {len(ruled)} rows for {len(samples)} samples; `decide` must return "
            f"each sample once"
        )
    try:
        return ruled.select(pl.col(name).cast(dtype) for name, dtype in RULING.items())
    except pl.exceptions.PolarsError as error:
        reason = " ".join(str(error).split())
        raise PlanError(
            f"{rule} returned a column of the wrong type ({reason}); `keep` is a Boolean, `reason` "
            f"text and `rank` a whole number"
        ) from error


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

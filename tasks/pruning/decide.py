"""Room `tasks`: which samples stay, and why; every policy answers with a frame of decisions."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import polars as pl

from secateur.errors import PlanError
from secateur.storage.shards import Samples
from secateur.tasks.data.batches import seed_for
from secateur.tasks.plan import (
    BalancedPolicy,
    BaselinePolicy,
    DropHarmfulPolicy,
    EL2NPolicy,
    GraNdPolicy,
    LossPolicy,
    Plan,
    Policy,
    RandomPolicy,
    ThresholdPolicy,
    TopPolicy,
    TracInPolicy,
)

OUTSIDE = "kept: not used in a window"


def decide_samples(
    plan: Plan, stage: int, policy: Policy, scores: pl.DataFrame, samples: Samples
) -> pl.DataFrame:
    """One row a sample of the stage: `sample`, `key`, `shard`, `score`, `loss`, `uses`, `keep`, `reason`, `rank`.

    Uses of a sample add up for `mean` and TracIn; the last one counts for `nearest`, loss, GraNd and EL2N. The best sample has rank 1. Samples that were
    not used in a window are kept, without a rank.

    Args:
        scores: the stage's, as `tasks.tracin.policy_scores` gives them for the policy.
    """
    judged = (
        scores.sort("step", maintain_order=True)
        .group_by("sample", maintain_order=True)
        .agg(
            _total(plan, policy).alias("score"),
            pl.col("loss", "grand", "el2n").last(),
            pl.len().cast(pl.UInt32).alias("uses"),
        )
        .sort("sample")
    )
    listed = samples.frame.select("sample", "key", "shard")
    ruled = _RULES[type(policy)](
        policy, judged.join(listed, "sample", maintain_order="left"), samples, plan, stage
    )
    decided = listed.join(
        ruled.select("sample", "score", "loss", "uses", "keep", "reason", "rank"),
        "sample",
        how="left",
        maintain_order="left",
    )
    return decided.with_columns(
        pl.col("uses").fill_null(0),
        pl.col("keep").fill_null(True),
        pl.col("reason").fill_null(OUTSIDE),
    )


def _total(plan: Plan, policy: Policy) -> pl.Expr:
    """A sample's score from those of its uses, in the order of their steps."""
    if isinstance(policy, TracInPolicy):
        return pl.col(f"tracin_{plan.target}").sum()
    column = pl.col(f"score_{plan.target}")
    return column.sum() if plan.score.aggregate == "mean" else column.last()


def count_decisions(decisions: pl.DataFrame) -> dict[str, Any]:
    """Samples in, kept and dropped, and how many for each reason."""
    dropped = decisions.filter(~pl.col("keep"))
    reasons = dropped.group_by("reason").len().sort("reason")
    return {
        "samples": len(decisions),
        "kept": len(decisions) - len(dropped),
        "dropped": len(dropped),
        "reasons": dict(reasons.iter_rows()),
    }


def _top(policy: TopPolicy, judged: pl.DataFrame, *_: object) -> pl.DataFrame:
    return _best(_ranked(judged, pl.col("score"), True), policy.keep, "score", "top")


def _tracin(policy: TracInPolicy, judged: pl.DataFrame, *_: object) -> pl.DataFrame:
    return _best(_ranked(judged, pl.col("score"), True), policy.keep, "score", "tracin")


def _baseline(policy: BaselinePolicy, judged: pl.DataFrame, *_: object) -> pl.DataFrame:
    """By the column of the policy's name."""
    ranked = _ranked(judged, pl.col(policy.policy).fill_nan(None), policy.prefer == "highest")
    within = pl.col("rank") <= round(len(ranked) * policy.keep)
    return _ruled(ranked, within, policy.policy, f"not among the {policy.prefer} {policy.keep:g}")


def _threshold(policy: ThresholdPolicy, judged: pl.DataFrame, *_: object) -> pl.DataFrame:
    keep = pl.col("score") >= policy.at_least
    return _ruled(
        _ranked(judged, pl.col("score"), True),
        keep,
        "threshold",
        f"score under {policy.at_least:g}",
    )


def _drop_harmful(policy: DropHarmfulPolicy, judged: pl.DataFrame, *_: object) -> pl.DataFrame:
    return _ruled(
        _ranked(judged, pl.col("score"), True),
        pl.col("score") >= 0,
        "drop_harmful",
        "score under 0",
    )


def _random(
    policy: RandomPolicy, judged: pl.DataFrame, samples: Samples, plan: Plan, stage: int
) -> pl.DataFrame:
    drawn = np.random.default_rng(seed_for(plan.seed, "random policy", stage)).permutation(
        len(judged)
    )
    return _best(
        _ranked(judged.with_columns(drawn=pl.Series(drawn)), pl.col("drawn"), False),
        policy.keep,
        "draw",
        "random",
    )


def _balanced(
    policy: BalancedPolicy, judged: pl.DataFrame, samples: Samples, *_: object
) -> pl.DataFrame:
    groups = pl.Series(_group_names(policy.by, samples, judged["sample"].to_list()))
    ranked = _ranked(judged.with_columns(group=groups), pl.col("score"), True)
    within = pl.col("rank").rank("ordinal").over("group")
    quota = (pl.len().over("group") * policy.keep).round()
    reason = pl.format("balanced: beyond the quota of {}", "group")
    return ranked.with_columns(keep=within <= quota).with_columns(
        reason=pl.when("keep").then(pl.lit("kept: balanced")).otherwise(reason)
    )


_RULES: dict[type, Callable[..., pl.DataFrame]] = {
    TopPolicy: _top,
    ThresholdPolicy: _threshold,
    DropHarmfulPolicy: _drop_harmful,
    BalancedPolicy: _balanced,
    RandomPolicy: _random,
    LossPolicy: _baseline,
    GraNdPolicy: _baseline,
    EL2NPolicy: _baseline,
    TracInPolicy: _tracin,
}


def _ranked(judged: pl.DataFrame, by: pl.Expr, descending: bool) -> pl.DataFrame:
    """Ranks from 1, the best; equal ones in the order of the samples."""
    ordered = judged.with_columns(by=by).sort(
        "by", "sample", descending=[descending, False], nulls_last=True
    )
    return ordered.with_columns(rank=pl.int_range(1, pl.len() + 1, dtype=pl.UInt32)).drop("by")


def _best(ranked: pl.DataFrame, fraction: float, what: str, policy: str) -> pl.DataFrame:
    """Keeps the first `fraction` of the ranks."""
    quota = round(len(ranked) * fraction)
    return _ruled(
        ranked, pl.col("rank") <= quota, policy, f"{what} not among the best {fraction:g}"
    )


def _ruled(ranked: pl.DataFrame, keep: pl.Expr, policy: str, why_not: str) -> pl.DataFrame:
    reason = (
        pl.when("keep").then(pl.lit(f"kept: {policy}")).otherwise(pl.lit(f"{policy}: {why_not}"))
    )
    return ranked.with_columns(keep=keep).with_columns(reason=reason)


def _group_names(by: str, samples: Samples, rows: list[int]) -> list[str]:
    """Label or domain of some samples: a member's text, or a field of a JSON member.

    Raises:
        PlanError: a sample has none.
    """
    member, _, field = by.partition(":")
    names = []
    for start in range(0, len(rows), 1024):
        for sample in samples.read(rows[start : start + 1024]):
            try:
                text = sample[member].decode()
                names.append(str(json.loads(text)[field]) if field else text.strip())
            except (KeyError, TypeError, ValueError) as error:
                raise PlanError(
                    f"sample {sample['__key__']} has no {by} to balance by; `by` names a member, or a field of a JSON "
                    f"member as member:field"
                ) from error
    return names

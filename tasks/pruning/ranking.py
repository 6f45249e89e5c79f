"""Rank samples and mark which are kept; what policies have in common."""

from __future__ import annotations

import polars as pl


def rank_samples(samples: pl.DataFrame, by: pl.Expr, descending: bool) -> pl.DataFrame:
    """Return the samples sorted by an expression, with `rank` from 1, the best.

    Equal ones keep the order of the sample list. Samples without a value come last.
    """
    ordered = samples.with_columns(by=by)
    ordered = ordered.sort("by", "sample", descending=[descending, False], nulls_last=True)
    return ordered.with_columns(rank=pl.int_range(1, pl.len() + 1, dtype=pl.UInt32)).drop("by")


def keep_best(ranked: pl.DataFrame, fraction: float, what: str, policy: str) -> pl.DataFrame:
    """Mark the first `fraction` of the ranks as kept; `what` names the value in the reason."""
    quota = round(len(ranked) * fraction)
    reason = f"{what} not among the best {fraction:g}"
    return mark_kept(ranked, pl.col("rank") <= quota, policy, reason)


def mark_kept(ranked: pl.DataFrame, keep: pl.Expr, policy: str, drop_reason: str) -> pl.DataFrame:
    """Return the samples with `keep`, and a `reason` that begins with the policy's name."""
    kept = pl.lit(f"kept: {policy}")
    dropped = pl.lit(f"{policy}: {drop_reason}")
    reason = pl.when("keep").then(kept).otherwise(dropped)
    return ranked.with_columns(keep=keep).with_columns(reason=reason)

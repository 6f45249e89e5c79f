"""Schemas of the Parquet frames that the project writes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import polars as pl

Schema = Mapping[str, pl.DataType | type[pl.DataType]]

_QUANTILES: Schema = dict.fromkeys(("q05", "q25", "q50", "q75", "q95"), pl.Float64)
_INTERVAL = ("mean", "low", "high")

# samples.parquet: a row per sample of a stage, in the order of its shards. `shard` is a position
# among the shards. The lists have an entry per member of the sample: its extension (`names`), the
# byte at which its header begins, the byte at which its payload begins, and its size in bytes.
# `sha256` is of the sample's bytes including headers, `content` of its members without key and
# headers (XXH3), `shard_xxh3` of its whole shard.
SAMPLES: Schema = {
    "sample": pl.UInt32,
    "key": pl.String,
    "shard": pl.UInt32,
    "names": pl.List(pl.String),
    "begins": pl.List(pl.UInt64),
    "offsets": pl.List(pl.UInt64),
    "sizes": pl.List(pl.UInt64),
    "sha256": pl.Binary,
    "content": pl.Binary,
    "shard_xxh3": pl.Binary,
}

# scores.parquet: a row per recorded use of a sample, in the order of the embeddings. `shard` is a
# path or URL, `loss` the loss before the step, `norm` the norm of the contribution. A column
# `score_<target>` per target follows, see `scores_schema`.
SCORES: Schema = {
    "sample": pl.UInt32,
    "key": pl.String,
    "shard": pl.String,
    "step": pl.UInt32,
    "window": pl.UInt32,
    "loss": pl.Float64,
    "norm": pl.Float64,
    "grand": pl.Float64,
    "el2n": pl.Float64,
}

# copies.parquet: a row per sample of a stage that has copies. `group` is the row of the first
# sample of its group, `exact` that of the first sample with the same members.
COPIES: Schema = {
    "sample": pl.UInt32,
    "key": pl.String,
    "exact": pl.UInt32,
    "group": pl.UInt32,
}

# decisions.parquet: a row per sample of a stage. A sample that was not used in a window has no
# score, loss and rank.
DECISIONS: Schema = {
    "sample": pl.UInt32,
    "key": pl.String,
    "shard": pl.UInt32,
    "score": pl.Float64,
    "loss": pl.Float64,
    "uses": pl.UInt32,
    "keep": pl.Boolean,
    "reason": pl.String,
    "rank": pl.UInt32,
}

# selection.parquet: a row per candidate of a step that selects its samples online.
SELECTION: Schema = {
    "step": pl.UInt32,
    "window": pl.UInt32,
    "sample": pl.UInt32,
    "score": pl.Float64,
    "gain": pl.Float64,
    "chosen": pl.Boolean,
    "rank": pl.UInt32,
    "reason": pl.String,
}

# profile.parquet: a row per stage, target, estimate, quantity and recorded step, with statistics
# of the quantity over the step's samples. `rate` is the step's learning rate.
PROFILE: Schema = {
    "stage": pl.UInt32,
    "target": pl.String,
    "estimate": pl.String,
    "quantity": pl.String,
    "step": pl.UInt32,
    "rate": pl.Float64,
    "count": pl.UInt32,
    "mean": pl.Float64,
    "std": pl.Float64,
    "mean_abs": pl.Float64,
    **_QUANTILES,
}

# evolution.parquet: a row per stage, target and later stage `view` from whose end the stage's
# influence is seen, with statistics over the stage's recorded steps.
EVOLUTION: Schema = {
    "stage": pl.UInt32,
    "target": pl.String,
    "mean": pl.Float64,
    "mean_abs": pl.Float64,
    **_QUANTILES,
    "view": pl.UInt32,
}

# audit.parquet: a row per removed use of a sample. `row` is its row in scores.parquet, `truth` the
# true change of the target's loss, `embedding` and `replay` the predicted scores.
AUDIT: Schema = {
    "row": pl.UInt32,
    "sample": pl.UInt32,
    "key": pl.String,
    "step": pl.UInt32,
    "window": pl.UInt32,
    "loss": pl.Float64,
    "norm": pl.Float64,
    "truth": pl.Float64,
    "embedding": pl.Float64,
    "replay": pl.Float64,
}

# agreement.parquet: a row per question, about the sample `key` of a target. `held` is the share of
# its gradient's squared norm that the basis holds, `most` and `best` are numbers of uses. For each
# estimate there are Spearman's correlation with replay over all uses, and the share of replay's
# `most` most helpful uses that are among the estimate's `best` most helpful.
AGREEMENT: Schema = {
    "target": pl.String,
    "key": pl.String,
    "held": pl.Float64,
    "most": pl.UInt32,
    "best": pl.UInt32,
    "spearman_embedding": pl.Float64,
    "found_embedding": pl.Float64,
    "spearman_pull_back": pl.Float64,
    "found_pull_back": pl.Float64,
}

# figures.parquet: a row per seed, arm, stage, target and metric (`figure`) of a comparison.
# `judges` is true for targets of held-out samples. `kept` is null for a stage without pruning,
# `select_seconds` if the time is unknown. See also `figures_schema`.
FIGURES: Schema = {
    "seed": pl.Int32,
    "arm": pl.String,
    "stage": pl.Int64,
    "samples": pl.Int64,
    "kept": pl.Int64,
    "steps": pl.Int64,
    "train_seconds": pl.Float64,
    "target": pl.String,
    "judges": pl.Boolean,
    "figure": pl.String,
    "value": pl.Float64,
    "select_seconds": pl.Float64,
}

# The first columns of summary.parquet, see `summary_schema`.
SUMMARY: Schema = {
    "arm": pl.String,
    "target": pl.String,
    "judges": pl.Boolean,
    "figure": pl.String,
    **dict.fromkeys(_INTERVAL, pl.Float64),
}


def scores_schema(targets: Iterable[str]) -> Schema:
    """Return the schema of scores.parquet for some targets."""
    return {**SCORES, **{f"score_{target}": pl.Float64 for target in targets}}


def figures_schema(seeds: Iterable[int]) -> Schema:
    """Return the schema of figures.parquet for some seeds."""
    # Polars stores a seed as Int32 if it fits, and else as Int64.
    if max(seeds) < 2**31:
        return FIGURES
    return {**FIGURES, "seed": pl.Int64}


def summary_schema(controls: Iterable[str]) -> Schema:
    """Return the schema of summary.parquet for some control arms.

    It has a row per arm, target and metric (`figure`) at the end of the last stage: the mean over
    the seeds and its interval, and the same of the difference from each control arm.
    """
    differences = [f"{control}_{name}" for control in controls for name in _INTERVAL]
    return {**SUMMARY, **dict.fromkeys(differences, pl.Float64)}

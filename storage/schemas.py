"""Schemas of the Parquet frames that the project writes."""

from __future__ import annotations

from collections.abc import Mapping

import polars as pl

Schema = Mapping[str, pl.DataType | type[pl.DataType]]

# samples.parquet: a row per sample of a stage, in the order of its shards. `shard` is a position
# among the shards. The lists have an entry per member of the sample: its extension (`names`), the
# byte at which its header begins, the byte at which its payload begins, and its size in bytes.
# `sha256` is of the sample's bytes including headers, `shard_xxh3` of its whole shard.
SAMPLES: Schema = {
    "sample": pl.UInt32,
    "key": pl.String,
    "shard": pl.UInt32,
    "names": pl.List(pl.String),
    "begins": pl.List(pl.UInt64),
    "offsets": pl.List(pl.UInt64),
    "sizes": pl.List(pl.UInt64),
    "sha256": pl.Binary,
    "shard_xxh3": pl.Binary,
}

"""Room `storage`: writing pruned shards, by copying the bytes of the members that stay."""

from __future__ import annotations

import posixpath
from collections.abc import Iterator, Sequence
from typing import IO

import fsspec
import numpy as np
import polars as pl

from storage.manifest import Attempt
from storage.root import explained
from storage.shards import member_end

CHUNK = 4 << 20


def rewrite_shards(attempt: Attempt, urls: Sequence[str], frame: pl.DataFrame, keep: np.ndarray) -> list[str]:
    """Copies each shard without the samples that are dropped; nothing is decoded, and order, keys, headers and
    members that belong to no sample stay as they are. A shard with no sample left isn't written.

    Args:
        frame: the shards' samples, as `index_shards` lists them.
        keep: one flag a row of `frame`.

    Returns:
        Names of the written shards, in order.
    """
    names = _names(urls)
    written = []
    for number, (url, name) in enumerate(zip(urls, names, strict=True)):
        here = (frame["shard"] == number).to_numpy()
        if not (here & keep).any():
            continue
        dropped = frame.filter(pl.Series(here & ~keep))
        with explained(f"shard {url}", "read"), fsspec.open(url, "rb") as source, attempt.open(name) as target:
            for start, stop in _kept_ranges(dropped):
                _copy(source, target, start, stop)
        written.append(name)
    return written


def _kept_ranges(dropped: pl.DataFrame) -> Iterator[tuple[int, int | None]]:
    """Byte ranges between dropped members; the last runs to the end of the file."""
    start = 0
    members = dropped.select("begins", "offsets", "sizes").explode("begins", "offsets", "sizes").sort("begins")
    for begin, offset, size in members.iter_rows():
        if begin > start:
            yield start, begin
        start = member_end(offset, size)
    yield start, None


def _copy(source: IO[bytes], target: IO[bytes], start: int, stop: int | None) -> None:
    source.seek(start)
    left = stop - start if stop is not None else None
    while left is None or left > 0:
        data = source.read(CHUNK if left is None else min(CHUNK, left))
        if not data:
            return
        target.write(data)
        left = None if left is None else left - len(data)


def _names(urls: Sequence[str]) -> list[str]:
    """Names of the rewritten shards: the same base names, numbered apart where two are alike."""
    bases = [posixpath.basename(url) for url in urls]
    alike = len(set(bases)) < len(bases)
    return [f"shards/{i:05d}-{base}" if alike else f"shards/{base}" for i, base in enumerate(bases)]

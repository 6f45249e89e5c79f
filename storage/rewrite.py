"""Pruned shards, written by copying the bytes of the members that stay."""

from __future__ import annotations

import posixpath
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from typing import IO

import numpy as np
import polars as pl
import xxhash

from secateur.storage.attempt import Attempt
from secateur.storage.hashing_writer import HashingWriter
from secateur.storage.io_errors import wrap_io_errors
from secateur.storage.sample_hashes import shard_changed_error
from secateur.storage.tars import member_end, open_shard

# Larger buffers, or more of them, would not stay in a processor's own cache.
BUFFER_SIZE = 1 << 20
BUFFERS = 4

# The first byte of a dropped member's header, and the byte after its padding.
Gap = tuple[int, int]


def rewrite_shards(
    attempt: Attempt, urls: Sequence[str], frame: pl.DataFrame, keep: np.ndarray
) -> list[str]:
    """Copy each shard without its dropped samples.

    Nothing is decoded. Order, keys, headers and members that belong to no sample do not change. A
    shard of which no sample is kept is not written.

    Args:
        attempt: the output to write to.
        urls: paths or URLs of the shards.
        frame: the shards' samples, as `list_shards` returns them.
        keep: one flag per row of `frame`.

    Returns:
        Names of the written shards, in order.

    Raises:
        StorageError: a shard has changed since it was listed.
    """
    names: list[str] = []
    for number in range(len(urls)):
        names += rewrite_shard(attempt, urls, number, frame, keep)
    return names


def rewrite_shard(
    attempt: Attempt, urls: Sequence[str], number: int, frame: pl.DataFrame, keep: np.ndarray
) -> list[str]:
    """Copy only the shard `urls[number]`, see `rewrite_shards`.

    Returns:
        The name of the written shard. Empty if no sample is kept.
    """
    start, stop = np.searchsorted(frame["shard"].to_numpy(), [number, number + 1]).tolist()
    shard_keep = keep[start:stop]
    if not shard_keep.any():
        return []
    name = _shard_names(urls)[number]
    with open_shard(urls[number]) as source, attempt.open(name) as target:
        _copy(source, urls[number], target, frame[start:stop], shard_keep)
    return [name]


def _copy(
    source: IO[bytes], url: str, target: HashingWriter, samples: pl.DataFrame, keep: np.ndarray
) -> None:
    """Write the bytes of a shard outside its dropped members, and compare its hash with the listed.

    Reading, writing and hashing overlap.
    """
    gaps = deque(_member_gaps(samples.filter(pl.Series(~keep))))
    buffers = deque(memoryview(bytearray(BUFFER_SIZE)) for _ in range(BUFFERS))
    pending: deque[Future[None]] = deque()
    digest = xxhash.xxh3_128()
    position = 0
    while size := _read(source, buffers[0], url):
        data = buffers[0][:size]
        digest.update(data)
        pending.append(target.write_pieces(list(_outside_gaps(data, position, gaps))))
        position += size
        buffers.rotate(-1)
        # The next buffer is filled only once its former content has been hashed.
        if len(pending) == BUFFERS:
            pending.popleft().result()
    if digest.digest() != samples["shard_xxh3"][0]:
        raise shard_changed_error(url)


def _outside_gaps(data: memoryview, start: int, gaps: deque[Gap]) -> Iterator[memoryview]:
    """Yield the parts of `data` outside the gaps, and remove the gaps that end within it.

    Args:
        data: consecutive bytes of the shard.
        start: position of the first of them in the shard.
        gaps: the gaps that end after `start`, in order.
    """
    position = start
    stop = start + len(data)
    while gaps and gaps[0][0] < stop:
        begin, end = gaps[0]
        if begin > position:
            yield data[position - start : begin - start]
        position = min(end, stop)
        if end > stop:
            return
        gaps.popleft()
    if position < stop:
        yield data[position - start :]


def _member_gaps(samples: pl.DataFrame) -> Iterator[Gap]:
    """Yield the bytes that the members of some samples take, in the order of the shard."""
    columns = ("begins", "offsets", "sizes")
    for begin, offset, size in samples.select(columns).explode(columns).iter_rows():
        yield begin, member_end(offset, size)


def _read(source: IO[bytes], buffer: memoryview, url: str) -> int:
    """Fill a buffer, and return the number of bytes read."""
    with wrap_io_errors(f"shard {url}", "read"):
        # Every binary file has `readinto`, but its declared type does not.
        return int(source.readinto(buffer))  # type: ignore[attr-defined]


def _shard_names(urls: Sequence[str]) -> list[str]:
    """Return the base names of the shards, preceded by numbers if two of them are equal."""
    bases = [posixpath.basename(url) for url in urls]
    if len(set(bases)) == len(bases):
        return [f"shards/{base}" for base in bases]
    return [f"shards/{number:05d}-{base}" for number, base in enumerate(bases)]

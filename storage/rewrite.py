"""Room `storage`: writing pruned shards, by copying the bytes of the members that stay."""

from __future__ import annotations

import posixpath
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from typing import IO

import numpy as np
import polars as pl
import xxhash

from secateur.storage.folder import wrap_io_errors
from secateur.storage.hashing_writer import HashingWriter
from secateur.storage.outputs import Attempt
from secateur.storage.sample_hashes import shard_changed_error
from secateur.storage.tars import member_end, open_shard

BLOCK, BLOCKS = 1 << 20, 4  # more, or larger ones, would not stay in a processor's own cache


def rewrite_shards(
    attempt: Attempt, urls: Sequence[str], frame: pl.DataFrame, keep: np.ndarray
) -> list[str]:
    """Copies each shard without the samples that are dropped; nothing is decoded, and order, keys, headers and
    members that belong to no sample stay as they are. A shard with no sample left isn't written.

    Args:
        frame: the shards' samples, as `index_shards` lists them.
        keep: one flag a row of `frame`.

    Returns:
        Names of the written shards, in order.

    Raises:
        StorageError: a shard has changed since it was listed.
    """
    written = []
    for number in range(len(urls)):
        written += rewrite_shard(attempt, urls, number, frame, keep)
    return written


def rewrite_shard(
    attempt: Attempt, urls: Sequence[str], number: int, frame: pl.DataFrame, keep: np.ndarray
) -> list[str]:
    """The shard `urls[number]` of `rewrite_shards` alone; its name, or nothing where it is not written."""
    start, stop = np.searchsorted(frame["shard"].to_numpy(), [number, number + 1]).tolist()
    listed, kept, name = frame[start:stop], keep[start:stop], _names(urls)[number]
    if not kept.any():
        return []
    with open_shard(urls[number]) as source, attempt.open(name) as target:
        _copy(source, urls[number], target, listed, kept)
    return [name]


def _copy(
    source: IO[bytes], url: str, target: HashingWriter, listed: pl.DataFrame, keep: np.ndarray
) -> None:
    """Writes the bytes of a shard outside its dropped members; the whole is held against what was listed. A block of memory
    is read into again once what was written of it has been hashed, so that reading, writing and hashing go on together."""
    holes = deque((b, member_end(o, s)) for b, o, s in _members(listed.filter(pl.Series(~keep))))
    digest, position, blocks = (
        xxhash.xxh3_128(),
        0,
        deque(memoryview(bytearray(BLOCK)) for _ in range(BLOCKS)),
    )
    hashing: deque[Future[None]] = deque()
    while size := _read(source, blocks[0], url):
        data = blocks[0][:size]
        digest.update(data)
        hashing.append(target.send(list(_outside(data, position, holes))))
        position += size
        blocks.rotate(-1)
        if len(hashing) == BLOCKS:
            hashing.popleft().result()
    if digest.digest() != listed["shard_xxh3"][0]:
        raise shard_changed_error(url)


def _outside(data: memoryview, start: int, holes: deque[tuple[int, int]]) -> Iterator[memoryview]:
    """What lies outside the holes of the bytes that begin at `start`; holes that end within are taken off."""
    position, stop = start, start + len(data)
    while holes and holes[0][0] < stop:
        begin, end = holes[0]
        if begin > position:
            yield data[position - start : begin - start]
        position = min(end, stop)
        if end > stop:
            return
        holes.popleft()
    if position < stop:
        yield data[position - start :]


def _members(listed: pl.DataFrame) -> list[tuple[int, int, int]]:
    """Beginning, payload and size of the members of some samples, in the order of the shard."""
    return listed.select("begins", "offsets", "sizes").explode("begins", "offsets", "sizes").rows()


def _read(source: IO[bytes], buffer: memoryview, url: str) -> int:
    with wrap_io_errors(f"shard {url}", "read"):
        return int(source.readinto(buffer))  # type: ignore[attr-defined]  # every binary file has it


def _names(urls: Sequence[str]) -> list[str]:
    """Names of the rewritten shards: the same base names, numbered apart where two are alike."""
    bases = [posixpath.basename(url) for url in urls]
    alike = len(set(bases)) < len(bases)
    return [f"shards/{i:05d}-{base}" if alike else f"shards/{base}" for i, base in enumerate(bases)]

"""Room `storage`: writing pruned shards, by copying the bytes of the members that stay."""

from __future__ import annotations

import hashlib
import posixpath
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import IO

import numpy as np
import polars as pl

from storage.manifest import Attempt
from storage.root import explained
from storage.spans import changed
from storage.tars import member_end, open_shard

CHUNK = 4 << 20


def rewrite_shards(attempt: Attempt, urls: Sequence[str], frame: pl.DataFrame, keep: np.ndarray) -> list[str]:
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
        for block in _joined(_kept(source, urls[number], listed, kept)):
            target.write(block)
    return [name]


def _kept(source: IO[bytes], url: str, listed: pl.DataFrame, keep: np.ndarray) -> Iterator[memoryview]:
    """The bytes of a shard outside its dropped members; the whole is held against what was listed."""
    holes = deque((b, member_end(o, s)) for b, o, s in _members(listed.filter(pl.Series(~keep))))
    digest, position, buffer = hashlib.sha256(), 0, memoryview(bytearray(CHUNK))
    with ThreadPoolExecutor(1) as beside:
        while size := _read(source, buffer, url):
            hashing = beside.submit(digest.update, buffer[:size])
            yield from _outside(buffer[:size], position, holes)
            position += size
            hashing.result()
    if digest.digest() != listed["shard_sha256"][0]:
        raise changed(url)


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
    with explained(f"shard {url}", "read"):
        return int(source.readinto(buffer))  # type: ignore[attr-defined]  # every binary file has it


def _joined(pieces: Iterable[memoryview]) -> Iterator[memoryview]:
    """The same bytes in blocks that are worth a write each; a block is overwritten by the next, for fresh memory costs more
    than the copy."""
    block, filled = memoryview(bytearray(CHUNK)), 0
    for piece in pieces:
        while piece:
            part = piece[: CHUNK - filled]
            block[filled : filled + len(part)] = part
            filled, piece = filled + len(part), piece[len(part) :]
            if filled == CHUNK:
                yield block
                filled = 0
    yield block[:filled]


def _names(urls: Sequence[str]) -> list[str]:
    """Names of the rewritten shards: the same base names, numbered apart where two are alike."""
    bases = [posixpath.basename(url) for url in urls]
    alike = len(set(bases)) < len(bases)
    return [f"shards/{i:05d}-{base}" if alike else f"shards/{base}" for i, base in enumerate(bases)]

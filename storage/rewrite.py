"""Room `storage`: writing pruned shards, by copying the bytes of the members that stay."""

from __future__ import annotations

import posixpath
from collections.abc import Iterable, Iterator, Sequence
from typing import IO

import numpy as np
import polars as pl

from storage.manifest import Attempt
from storage.root import explained
from storage.shards import HASH
from storage.spans import Checking, changed, spans
from storage.tars import BLOCK, member_end, open_shard

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
    bounds = np.searchsorted(frame["shard"].to_numpy(), np.arange(len(urls) + 1))
    written = []
    for number, (url, name) in enumerate(zip(urls, _names(urls), strict=True)):
        rows = slice(int(bounds[number]), int(bounds[number + 1]))
        if not keep[rows].any():
            continue
        listed = frame[rows]
        with open_shard(url) as source, attempt.open(name) as target:
            for block in _joined(_kept(source, url, listed, keep[rows])):
                target.write(block)
        written.append(name)
    return written


def _kept(source: IO[bytes], url: str, listed: pl.DataFrame, keep: np.ndarray) -> Iterator[bytes]:
    """The bytes of a shard outside its dropped members, held against what was listed."""
    staying = listed.filter(pl.Series(keep))
    checking = Checking(url, staying["key"], spans(staying), staying[HASH])
    position = 0
    for begin, offset, size in _members(listed.filter(pl.Series(~keep))):
        while position < begin:
            data = _read(source, url, position, min(CHUNK, begin - position))
            if not data:
                raise changed(url)
            checking.update(position, data)
            position += len(data)
            yield data
        position = member_end(offset, size)
    while data := _read(source, url, position, CHUNK):
        checking.update(position, data)
        position += len(data)
        yield data
    _, offset, size = _members(listed)[-1]
    if position < member_end(offset, size) + BLOCK:
        raise changed(url)


def _members(listed: pl.DataFrame) -> list[tuple[int, int, int]]:
    """Beginning, payload and size of the members of some samples, in the order of the shard."""
    return listed.select("begins", "offsets", "sizes").explode("begins", "offsets", "sizes").rows()


def _read(source: IO[bytes], url: str, start: int, size: int) -> bytes:
    with explained(f"shard {url}", "read"):
        source.seek(start)
        return source.read(size)


def _joined(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """The same bytes in blocks that are worth a write each."""
    held: list[bytes] = []
    size = 0
    for piece in pieces:
        held.append(piece)
        size += len(piece)
        if size >= CHUNK:
            yield b"".join(held)
            held, size = [], 0
    yield b"".join(held)


def _names(urls: Sequence[str]) -> list[str]:
    """Names of the rewritten shards: the same base names, numbered apart where two are alike."""
    bases = [posixpath.basename(url) for url in urls]
    alike = len(set(bases)) < len(bases)
    return [f"shards/{i:05d}-{base}" if alike else f"shards/{base}" for i, base in enumerate(bases)]

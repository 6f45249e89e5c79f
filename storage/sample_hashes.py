"""Room `storage`: the bytes of a sample in its shard, and their hashes, by which a change after listing is seen."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import polars as pl
import xxhash

from secateur.errors import StorageError
from secateur.storage.tars import BUFFER, open_shard

Span = tuple[int, int]


def sample_spans(frame: pl.DataFrame) -> list[Span]:
    """Of each listed sample, where its first member's header begins and its last member's payload ends."""
    ends = pl.col("offsets").list.last() + pl.col("sizes").list.last()
    return frame.select(pl.col("begins").list.first(), ends).rows()


def hash_shard(url: str, of: Sequence[Span]) -> tuple[bytes, list[bytes]]:
    """The XXH3 (128 bits) of a whole shard, and the sha256 of each of its spans, in one pass by chunks of a megabyte.

    Raises:
        StorageError: the shard is shorter than the spans say.
    """
    whole, digest, start = xxhash.xxh3_128(), hashlib.sha256(), 0
    found: list[bytes] = []
    with open_shard(url) as file:
        while data := file.read(BUFFER):
            whole.update(data)
            view, stop = memoryview(data), start + len(data)
            while len(found) < len(of):
                begin, end = of[len(found)]
                digest.update(view[max(begin - start, 0) : max(end - start, 0)])
                if end > stop:
                    break
                found.append(digest.digest())
                digest = hashlib.sha256()
            start = stop
    if len(found) < len(of):
        raise shard_changed_error(url)
    return whole.digest(), found


def check_sample_hash(url: str, key: str, data: bytes, sha256: bytes) -> None:
    """Holds a sample's bytes against what was listed.

    Raises:
        StorageError: they are others.
    """
    if hashlib.sha256(data).digest() != sha256:
        raise shard_changed_error(url, key)


def shard_changed_error(url: str, key: str | None = None) -> StorageError:
    """What to say of a shard that isn't what was listed."""
    sample = f"; its sample {key} is another" if key is not None else ""
    return StorageError(
        f"shard {url} has changed since it was listed{sample}; restore it, or start a run of another name on the new data"
    )

"""Hashes of shards and of the samples in them, which reveal any change after the listing."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import polars as pl
import xxhash

from secateur.errors import StorageError
from secateur.storage.tars import BUFFER, open_shard

# A first byte within a shard, and the byte after the last.
Span = tuple[int, int]


@dataclass(frozen=True)
class ShardHashes:
    """The hashes of a shard.

    Attributes:
        xxh3: XXH3 (128 bits) of the whole shard.
        samples: the SHA-256 of each sample.
        payloads: XXH3 (128 bits) of the payload of each member.
        sha256: the SHA-256 of the whole shard in hexadecimal digits, if it was asked for.
    """

    xxh3: bytes
    samples: list[bytes]
    payloads: list[bytes]
    sha256: str | None


def sample_spans(frame: pl.DataFrame) -> list[Span]:
    """Return the span of each listed sample, from its first header to its last payload."""
    ends = pl.col("offsets").list.last() + pl.col("sizes").list.last()
    return frame.select(pl.col("begins").list.first(), ends).rows()


def payload_spans(frame: pl.DataFrame) -> list[Span]:
    """Return the span of each payload of the listed samples."""
    members = frame.select(pl.col("offsets", "sizes").explode())
    return members.select("offsets", stop=pl.col("offsets") + pl.col("sizes")).rows()


def content_hashes(frame: pl.DataFrame, payloads: Sequence[bytes]) -> list[bytes]:
    """Return a hash of each listed sample's members and their names, whatever the sample's key.

    Args:
        frame: the samples.
        payloads: the hash of the payload of each of their members.
    """
    remaining = iter(payloads)
    hashes = []
    for names in frame["names"]:
        members = sorted(zip(names, remaining, strict=False))
        parts = [digest + name.encode() + b"\0" for name, digest in members]
        hashes.append(xxhash.xxh3_128(b"".join(parts)).digest())
    return hashes


def hash_shard(
    url: str, spans: Sequence[Span], payloads: Sequence[Span] = (), with_sha256: bool = False
) -> ShardHashes:
    """Hash a shard, its samples and their members in one pass, in chunks of one mebibyte.

    Args:
        url: path or URL of the shard.
        spans: the samples' spans, in the order of the shard.
        payloads: the spans of their members' payloads.
        with_sha256: also compute the SHA-256 of the whole shard.

    Raises:
        StorageError: the shard ends before the last span.
    """
    xxh3 = xxhash.xxh3_128()
    sha256 = hashlib.sha256() if with_sha256 else None
    samples = _SpanHasher(spans, hashlib.sha256)
    members = _SpanHasher(payloads, xxhash.xxh3_128)
    with open_shard(url) as file:
        while data := file.read(BUFFER):
            xxh3.update(data)
            if sha256 is not None:
                sha256.update(data)
            samples.update(data)
            members.update(data)
    if len(samples.hashes) < len(spans):
        raise shard_changed_error(url)
    whole = sha256.hexdigest() if sha256 else None
    return ShardHashes(xxh3.digest(), samples.hashes, members.hashes, whole)


class _SpanHasher:
    """The hash of each span of a shard, from consecutive chunks of the shard."""

    def __init__(self, spans: Sequence[Span], new_hash: Callable[[], Any]) -> None:
        self.hashes: list[bytes] = []
        self._spans = spans
        self._new_hash = new_hash
        self._digest = new_hash()
        self._position = 0

    def update(self, data: bytes) -> None:
        """Hash the next chunk."""
        view = memoryview(data)
        start = self._position
        self._position += len(data)
        while len(self.hashes) < len(self._spans):
            begin, end = self._spans[len(self.hashes)]
            self._digest.update(view[max(begin - start, 0) : max(end - start, 0)])
            if end > self._position:
                return
            self.hashes.append(self._digest.digest())
            self._digest = self._new_hash()


def check_sample_hash(url: str, key: str, data: bytes, sha256: bytes) -> None:
    """Compare the bytes of a sample with its listed SHA-256.

    Raises:
        StorageError: they differ.
    """
    if hashlib.sha256(data).digest() != sha256:
        raise shard_changed_error(url, key)


def shard_changed_error(url: str, key: str | None = None) -> StorageError:
    """Return the error for a shard that has changed since it was listed.

    Args:
        url: path or URL of the shard.
        key: the sample that differs, if it is known.
    """
    sample = f"; its sample {key} is different" if key is not None else ""
    return StorageError(
        f"shard {url} has changed since it was listed{sample}; restore it, or start a run "
        f"under another name on the new data"
    )

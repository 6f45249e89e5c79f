"""The listing of shards: one row per sample, with the places and hashes of its bytes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import polars as pl

from secateur.errors import StorageError, UnavailableError
from secateur.storage.sample_hashes import (
    content_hashes,
    hash_shard,
    payload_spans,
    sample_spans,
    shard_changed_error,
)
from secateur.storage.schemas import SAMPLES, Schema
from secateur.storage.shard_members import Member, iter_sample_members
from secateur.storage.tars import shard_exists, shard_version

# A row per member, from which the rows of `SAMPLES` are grouped.
MEMBERS: Schema = {
    "sample": pl.UInt32,
    "key": pl.String,
    "shard": pl.UInt32,
    "names": pl.String,
    "begins": pl.UInt64,
    "offsets": pl.UInt64,
    "sizes": pl.UInt64,
}
HASHES: Schema = {name: SAMPLES[name] for name in ("sha256", "content", "shard_xxh3")}


class WrongShardError(StorageError):
    """A shard that is not the one that was expected.

    Attributes:
        url: path or URL of the shard.
        problem: `missing` or `changed`.
    """

    def __init__(self, url: str, problem: str) -> None:
        super().__init__(f"shard {url} is {problem}; restore it")
        self.url = url
        self.problem = problem


def list_shards(
    urls: Sequence[str],
    skip: Callable[[str], None] | None = None,
    expected_sha256: Mapping[str, str] | None = None,
) -> pl.DataFrame:
    """Return one row per sample in the order of the shards, as `schemas.SAMPLES` describes.

    A first pass reads the tar headers, a second pass hashes all bytes. A sample is protected by its
    SHA-256. The XXH3 of the whole shard finds accidental damage at a tenth of the cost.

    Args:
        urls: paths or URLs of the shards.
        skip: called with one sentence for each damaged shard, which is then left out entirely. A
            damaged shard is an error if this is None.
        expected_sha256: SHA-256 of whole shards in hexadecimal digits, by path or URL. They are
            compared in the pass that hashes the samples.

    Raises:
        WrongShardError: a shard differs from its expected SHA-256, or does not exist.
        StorageError: a shard is no tar, is truncated or compressed, or a key occurs twice.
    """
    expected = expected_sha256 or {}
    for url in urls:
        if url in expected and not shard_exists(url):
            raise WrongShardError(url, "missing")
    versions = [shard_version(url) for url in urls]
    frame = _list_samples(urls, skip, expected)
    _check_unique_keys(urls, frame, expected)
    return frame.hstack(_hash_samples(urls, frame, versions, expected))


def _list_samples(
    urls: Sequence[str], skip: Callable[[str], None] | None, expected: Mapping[str, str]
) -> pl.DataFrame:
    """Return the rows of `SAMPLES` without the hashes."""
    columns: list[list[Any]] = [[] for _ in MEMBERS]
    sample = -1
    for shard, url in enumerate(urls):
        for member in _list_members(url, skip, expected):
            sample += member.begins_sample
            values = (sample, member.key, shard, *member[2:])
            for column, value in zip(columns, values, strict=True):
                column.append(value)
    members = pl.DataFrame(dict(zip(MEMBERS, columns, strict=True)), schema=MEMBERS)
    return members.group_by("sample", maintain_order=True).agg(
        pl.col("key", "shard").first(), pl.col("names", "begins", "offsets", "sizes")
    )


def _list_members(
    url: str, skip: Callable[[str], None] | None, expected: Mapping[str, str]
) -> list[Member]:
    """Return the members of a whole shard, or none if it is damaged and may be skipped."""
    try:
        return list(iter_sample_members(url))
    except UnavailableError:
        # The store may answer later, so the shard must not be left out.
        raise
    except StorageError as error:
        _check_whole_shard(url, expected)
        if skip is None:
            raise
        skip(str(error))
        return []


def _check_unique_keys(
    urls: Sequence[str], frame: pl.DataFrame, expected: Mapping[str, str]
) -> None:
    """Check that no key occurs twice, and name both places of the first that does."""
    repeated = frame.filter(pl.col("key").is_duplicated())
    if not len(repeated):
        return
    for shard in repeated["shard"].unique(maintain_order=True):
        _check_whole_shard(urls[shard], expected)
    places = repeated.filter(pl.col("key") == repeated["key"][0]).head(2)
    first_samples = frame.group_by("shard").agg(pl.col("sample").min().alias("first"))
    numbered = places.join(first_samples, "shard", maintain_order="left").select(
        "shard", pl.col("sample") - pl.col("first")
    )
    one, other = (f"sample {number} of {urls[shard]}" for shard, number in numbered.iter_rows())
    raise StorageError(
        f"key {places['key'][0]} occurs twice, as {one} and as {other}, with "
        f"{repeated['key'].n_unique()} repeated keys in all; give every sample a unique key and "
        f"write its members consecutively"
    )


def _hash_samples(
    urls: Sequence[str], frame: pl.DataFrame, versions: Sequence[str], expected: Mapping[str, str]
) -> pl.DataFrame:
    """Return the columns `HASHES` of the samples, and compare the hashes of expected shards."""
    columns: dict[str, list[bytes]] = {name: [] for name in HASHES}
    by_shard = frame.partition_by("shard", maintain_order=True, as_dict=True)
    for shard, url in enumerate(urls):
        rows = by_shard.get((shard,))
        if rows is None:
            # A changed shard may have become a tar without samples.
            _check_whole_shard(url, expected)
            continue
        hashes = hash_shard(url, sample_spans(rows), payload_spans(rows), url in expected)
        if url in expected and hashes.sha256 != expected[url]:
            raise WrongShardError(url, "changed")
        # Without this check, the byte offsets could be those of an earlier version.
        if shard_version(url) != versions[shard]:
            raise shard_changed_error(url)
        columns["sha256"] += hashes.samples
        columns["content"] += content_hashes(rows, hashes.payloads)
        columns["shard_xxh3"] += [hashes.xxh3] * len(rows)
    return pl.DataFrame(columns, schema=HASHES)


def _check_whole_shard(url: str, expected: Mapping[str, str]) -> None:
    """Compare a shard with its expected SHA-256, if it has one.

    Raises:
        WrongShardError: they differ.
    """
    if url in expected and hash_shard(url, [], with_sha256=True).sha256 != expected[url]:
        raise WrongShardError(url, "changed")

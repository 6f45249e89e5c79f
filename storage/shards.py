"""WebDataset shards: their URLs, the list of their samples, and the bytes of any sample."""

from __future__ import annotations

import os
import re
import unicodedata
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import IO, Any, NamedTuple

import polars as pl
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem
from webdataset.shardlists import expand_urls
from webdataset.tariterators import base_plus_ext

from secateur.errors import StorageError, UnavailableError
from secateur.storage.folder import wrap_io_errors
from secateur.storage.sample_hashes import (
    check_sample_hash,
    hash_shard,
    sample_spans,
    shard_changed_error,
)
from secateur.storage.schemas import SAMPLES, Schema
from secateur.storage.tars import iter_members, shard_exists, shard_version
from secateur.storage.urls import check_url

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
HASHES: Schema = {name: SAMPLES[name] for name in ("sha256", "shard_xxh3")}
SIDE_FILE = re.compile(r"__[^/]*__($|/)")  # WebDataset's own, which belong to no sample
RESERVED = {"__key__", "__url__"}
MAX_OPEN_FILES = 128
MISLEADING = ("Cc", "Cs", "Zl", "Zp")  # Unicode's control characters, surrogates, line separators


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


class ByteRange(NamedTuple):
    """Consecutive bytes of a shard.

    Attributes:
        shard: the shard's position among the shards.
        start: the first byte.
        stop: the byte after the last.
    """

    shard: int
    start: int
    stop: int


class Member(NamedTuple):
    """A member of a shard that belongs to a sample.

    Attributes:
        begins_sample: whether it is the first member of its sample.
        key: the sample's key.
        name: its extension.
        begin: the first byte of its header.
        offset: the first byte of its payload.
        size: bytes of its payload.
    """

    begins_sample: bool
    key: str
    name: str
    begin: int
    offset: int
    size: int


def expand_shard_urls(shards: str | Sequence[str]) -> list[str]:
    """Return the paths or URLs that WebDataset's brace notation stands for.

    Raises:
        StorageError: there are none, or one of them does not exist.
    """
    patterns = [shards] if isinstance(shards, str) else list(shards)
    urls = [url for pattern in patterns for url in expand_urls(pattern)]
    for url in urls:
        check_url(url)
        if not shard_exists(url):
            raise StorageError(f"shard {url} does not exist; check `shards` in the plan")
    if not urls:
        raise StorageError("`shards` names no shard; give a path or a brace pattern")
    return urls


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
        return list(_iter_sample_members(url))
    except UnavailableError:
        # The store may answer later, so the shard must not be left out.
        raise
    except StorageError as error:
        _check_whole_shard(url, expected)
        if skip is None:
            raise
        skip(str(error))
        return []


def _iter_sample_members(url: str) -> Iterator[Member]:
    """Yield each member that belongs to a sample.

    Consecutive members with the same key form a sample, as WebDataset groups them.
    """
    last_key = None
    names: set[str] = set()
    for info in iter_members(url):
        _check_member_name(url, info.name)
        key, extension = base_plus_ext(info.name)
        if not key or SIDE_FILE.match(info.name):
            continue
        name = extension.lower()
        begins_sample = key != last_key
        if begins_sample:
            last_key = key
            names = set(RESERVED)
        if name in names:
            raise StorageError(
                f"sample {key} of {url} has a member .{name} twice, or one with a name that "
                f"WebDataset reserves; rename it"
            )
        names.add(name)
        yield Member(begins_sample, key, name, info.offset, info.offset_data, info.size)


def _check_member_name(url: str, name: str) -> None:
    """Check that a member's name cannot mislead a reader or another program.

    Keys are printed in reports and tables, and other programs unpack shards.
    """
    if name.startswith("/") or ".." in name.split("/"):
        raise StorageError(
            f"shard {url} has a member whose name points outside it ({name!a}); rename it"
        )
    # `isprintable` is quick, but it also rejects harmless characters such as rare spaces.
    if not name.isprintable() and any(unicodedata.category(c) in MISLEADING for c in name):
        raise StorageError(
            f"shard {url} has a member whose name is not UTF-8, or holds control characters "
            f"({name!a}); rename it"
        )


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
        hashes = hash_shard(url, sample_spans(rows), with_sha256=url in expected)
        if url in expected and hashes.sha256 != expected[url]:
            raise WrongShardError(url, "changed")
        # Without this check, the byte offsets could be those of an earlier version.
        if shard_version(url) != versions[shard]:
            raise shard_changed_error(url)
        columns["sha256"] += hashes.samples
        columns["shard_xxh3"] += [hashes.xxh3] * len(rows)
    return pl.DataFrame(columns, schema=HASHES)


def _check_whole_shard(url: str, expected: Mapping[str, str]) -> None:
    """Compare a shard with its expected SHA-256, if it has one.

    Raises:
        WrongShardError: they differ.
    """
    if url in expected and hash_shard(url, [], with_sha256=True).sha256 != expected[url]:
        raise WrongShardError(url, "changed")


class Samples:
    """Listed samples, which any thread may read in any order. Shards stay open between reads.

    The object can be pickled, and so be sent to a spawned process.
    """

    def __init__(self, urls: Sequence[str], frame: pl.DataFrame) -> None:
        self.urls = list(urls)
        self.frame = frame
        self._local_paths = [_local_path(url) for url in urls]
        self._open_files: OrderedDict[int, IO[bytes]] = OrderedDict()

    def __len__(self) -> int:
        return len(self.frame)

    def __reduce__(self) -> tuple[Any, ...]:
        return Samples, (self.urls, self.frame)

    def read(self, rows: Sequence[int]) -> list[dict[str, Any]]:
        """Return the samples at `rows`: `__key__`, and the bytes of each member by its extension.

        Raises:
            StorageError: a shard cannot be read, or has changed since it was listed.
        """
        listed = list(self.frame[list(rows)].iter_rows(named=True))
        ranges = [
            ByteRange(row["shard"], row["begins"][0], row["offsets"][-1] + row["sizes"][-1])
            for row in listed
        ]
        samples = []
        for row, place, data in zip(listed, ranges, self._read_ranges(ranges), strict=True):
            check_sample_hash(self.urls[place.shard], row["key"], data, row["sha256"])
            sample: dict[str, Any] = {"__key__": row["key"]}
            for name, offset, size in zip(row["names"], row["offsets"], row["sizes"], strict=True):
                begin = offset - place.start
                sample[name] = data[begin : begin + size]
            samples.append(sample)
        return samples

    def keys(self, rows: Sequence[int]) -> list[str]:
        """Return the keys of the samples at `rows`."""
        return self.frame["key"][list(rows)].to_list()

    def shard_url(self, key: str) -> str:
        """Return the path or URL of the shard that contains a key."""
        shard: int = self.frame.filter(pl.col("key") == key)["shard"][0]
        return self.urls[shard]

    def _read_ranges(self, ranges: Sequence[ByteRange]) -> list[bytes]:
        """Read byte ranges: local ones from open files, remote ones all in one request."""
        remote = [place for place in ranges if self._local_paths[place.shard] is None]
        remote_data = iter(self._read_remote(remote))
        return [
            self._read_local(place) if self._local_paths[place.shard] else next(remote_data)
            for place in ranges
        ]

    def _read_local(self, place: ByteRange) -> bytes:
        with wrap_io_errors(f"shard {self.urls[place.shard]}", "read"):
            file = self._open_file(place.shard)
            # The position is given with each read, so threads and forks may share the file.
            return os.pread(file.fileno(), place.stop - place.start, place.start)

    def _read_remote(self, ranges: Sequence[ByteRange]) -> list[bytes]:
        if not ranges:
            return []
        urls = [self.urls[place.shard] for place in ranges]
        with wrap_io_errors(f"shard {urls[0]} or one read with it", "read"):
            filesystem = url_to_fs(urls[0])[0]
            paths = [url_to_fs(url)[1] for url in urls]
            starts = [place.start for place in ranges]
            stops = [place.stop for place in ranges]
            return list(filesystem.cat_ranges(paths, starts, stops, on_error="raise"))

    def _open_file(self, shard: int) -> IO[bytes]:
        """Return the open file of a local shard."""
        file = self._open_files.get(shard)
        if file is None:
            path = self._local_paths[shard]
            assert path is not None
            file = open(path, "rb", buffering=0)  # noqa: SIM115  # stays open
            self._open_files[shard] = file
            if len(self._open_files) > MAX_OPEN_FILES:
                # It is not closed here, because another thread may be reading it. Python closes it
                # after the last use.
                self._open_files.popitem(last=False)
        return file


def _local_path(url: str) -> str | None:
    """Return the path of a local shard, or None for a remote one."""
    filesystem, path = url_to_fs(url)
    return path if isinstance(filesystem, LocalFileSystem) else None

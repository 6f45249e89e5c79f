"""Room `storage`: WebDataset shards: finding them, listing their samples, reading any sample's bytes."""

from __future__ import annotations

import os
import re
import unicodedata
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import IO, Any

import polars as pl
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem
from webdataset.shardlists import expand_urls
from webdataset.tariterators import base_plus_ext

from secateur.errors import StorageError
from secateur.storage.folder import wrap_io_errors
from secateur.storage.sample_hashes import (
    check_sample_hash,
    hash_shard,
    sample_spans,
    shard_changed_error,
)
from secateur.storage.tars import iter_members, shard_version
from secateur.storage.urls import check_url

MEMBERS: dict[str, Any] = {
    "sample": pl.UInt32,
    "key": pl.String,
    "shard": pl.UInt32,
    "names": pl.String,
    "begins": pl.UInt64,
    "offsets": pl.UInt64,
    "sizes": pl.UInt64,
}
HASHES = {"sha256": pl.Binary, "shard_xxh3": pl.Binary}
META = re.compile(r"__[^/]*__($|/)")  # WebDataset's own side files
RESERVED = {"__key__", "__url__"}
OPEN_FILES = 128


def expand_shard_urls(shards: str | Sequence[str]) -> list[str]:
    """Paths or URLs from WebDataset's brace notation.

    Raises:
        StorageError: one of them does not exist.
    """
    patterns = [shards] if isinstance(shards, str) else list(shards)
    urls = [url for pattern in patterns for url in expand_urls(pattern)]
    for url in urls:
        check_url(url)
        with wrap_io_errors(f"shard {url}", "looked for"):
            filesystem, path = url_to_fs(url)
            if not filesystem.exists(path):
                raise StorageError(f"shard {url} does not exist; check `shards` in the plan")
    if not urls:
        raise StorageError("`shards` names no shard; give a path or a brace pattern")
    return urls


def list_shards(urls: Sequence[str], skip: Callable[[str], None] | None = None) -> pl.DataFrame:
    """One row a sample, in shard order: its `key`, `shard` (position in `urls`), and of each member its extension
    (`names`), where its header begins (`begins`), where its payload is (`offsets`) and its size in bytes (`sizes`); of
    all its bytes, headers included, the `sha256`, and of its whole shard the `shard_xxh3` (XXH3, 128 bits: it finds what
    went wrong by itself, at a tenth of the cost; what a sample is trained on is held by the sha256).

    Args:
        skip: where given, a shard that is no whole tar is left out, all of it, and told to this in one sentence.

    Raises:
        StorageError: a shard is no tar, is truncated or compressed, or a key is there twice.
    """
    columns: list[list[Any]] = [[] for _ in MEMBERS]
    sample, stamps = -1, [shard_version(url) for url in urls]
    for shard, url in enumerate(urls):
        for new, key, *place in _whole(url, skip):
            sample += new
            for column, value in zip(columns, (sample, key, shard, *place), strict=True):
                column.append(value)
    listed = pl.DataFrame(dict(zip(MEMBERS, columns, strict=True)), schema=MEMBERS)
    once, *lists = pl.col("key", "shard").first(), pl.col("names", "begins", "offsets", "sizes")
    frame = listed.group_by("sample", maintain_order=True).agg(once, *lists)
    repeated = frame.filter(pl.col("key").is_duplicated())
    if len(repeated):
        raise StorageError(_repetition(urls, frame, repeated))
    hashes: dict[str, list[bytes]] = {name: [] for name in HASHES}
    for rows in frame.partition_by("shard", maintain_order=True):
        shard = rows["shard"][0]
        whole, each = hash_shard(urls[shard], sample_spans(rows))
        if shard_version(urls[shard]) != stamps[shard]:
            raise shard_changed_error(urls[shard])
        hashes["sha256"] += each
        hashes["shard_xxh3"] += [whole] * len(each)
    return frame.hstack(pl.DataFrame(hashes, schema=HASHES))


def _whole(
    url: str, skip: Callable[[str], None] | None
) -> list[tuple[bool, str, str, int, int, int]]:
    """What `_grouped` gives of a whole shard, and nothing of a damaged one that may be skipped."""
    try:
        return list(_grouped(url))
    except StorageError as error:
        if skip is None:
            raise
        skip(str(error))
        return []


def _repetition(urls: Sequence[str], frame: pl.DataFrame, repeated: pl.DataFrame) -> str:
    """Which key is there twice, and where."""
    places = repeated.filter(pl.col("key") == repeated["key"][0]).head(2)
    first = frame.group_by("shard").agg(pl.col("sample").min().alias("first"))
    counted = places.join(first, "shard", maintain_order="left").select(
        "shard", pl.col("sample") - pl.col("first")
    )
    one, other = (f"sample {number} of {urls[shard]}" for shard, number in counted.iter_rows())
    return (
        f"key {places['key'][0]} is there twice, as {one} and as {other}, with {repeated['key'].n_unique()} keys repeated in "
        f"all; give every sample a key of its own and write its members side by side"
    )


def _grouped(url: str) -> Iterator[tuple[bool, str, str, int, int, int]]:
    """Each member that belongs to a sample: whether it begins one, key, extension, and its place. Consecutive members
    that share a key are a sample, as WebDataset groups them."""
    last = None
    names: set[str] = set()
    for member in iter_members(url):
        _check_name(url, member.name)
        key, extension = base_plus_ext(member.name)
        if not key or META.match(member.name):
            continue
        name, new = extension.lower(), key != last
        if new:
            last, names = key, set(RESERVED)
        if name in names:
            raise StorageError(
                f"sample {key} of {url} has a member .{name} twice, or of a name that WebDataset keeps for itself; rename it"
            )
        names.add(name)
        yield new, key, name, member.offset, member.offset_data, member.size


def _check_name(url: str, name: str) -> None:
    """Keys are names in reports and tables, and other programs unpack shards: what could mislead them is refused."""
    if name.startswith("/") or ".." in name.split("/"):
        raise StorageError(
            f"shard {url} has a member whose name leads out of it ({name!a}); rename it"
        )
    if not name.isprintable() and any(
        unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") for c in name
    ):
        raise StorageError(
            f"shard {url} has a member whose name is not UTF-8, or holds control characters ({name!a}); rename it"
        )


class Samples:
    """Listed samples, read by row in any order by any thread; shards stay open between reads. It can be pickled, to go
    to a spawned process."""

    def __init__(self, urls: Sequence[str], frame: pl.DataFrame) -> None:
        self.urls, self.frame = list(urls), frame
        self._local = [
            path if isinstance(fs, LocalFileSystem) else None for fs, path in map(url_to_fs, urls)
        ]
        self._files: OrderedDict[int, IO[bytes]] = OrderedDict()

    def __len__(self) -> int:
        return len(self.frame)

    def __reduce__(self) -> tuple[Any, ...]:
        return Samples, (self.urls, self.frame)

    def read(self, rows: Sequence[int]) -> list[dict[str, Any]]:
        """The samples at `rows`: `__key__`, and the bytes of each member by extension.

        Raises:
            StorageError: a shard cannot be read, or has changed since it was listed.
        """
        listed = list(self.frame[list(rows)].iter_rows(named=True))
        places = [
            (row["shard"], row["begins"][0], row["offsets"][-1] + row["sizes"][-1])
            for row in listed
        ]
        read = []
        for row, (shard, start, _), data in zip(listed, places, self._fetch(places), strict=True):
            check_sample_hash(self.urls[shard], row["key"], data, row["sha256"])
            sample: dict[str, Any] = {"__key__": row["key"]}
            for name, offset, size in zip(row["names"], row["offsets"], row["sizes"], strict=True):
                sample[name] = data[offset - start : offset - start + size]
            read.append(sample)
        return read

    def keys(self, rows: Sequence[int]) -> list[str]:
        """The keys of some rows."""
        return self.frame["key"][list(rows)].to_list()

    def shard_url(self, key: str) -> str:
        """Path or URL of the shard that holds a key."""
        return self.urls[self.frame.filter(pl.col("key") == key)["shard"][0]]

    def _fetch(self, sample_spans: list[tuple[int, int, int]]) -> list[bytes]:
        """Byte ranges of shards: local ones from files kept open, remote ones all at once."""
        found: dict[int, bytes] = {}
        remote = [
            place for place, (shard, _, _) in enumerate(sample_spans) if self._local[shard] is None
        ]
        for place, (shard, start, stop) in enumerate(sample_spans):
            if (path := self._local[shard]) is not None:
                with wrap_io_errors(f"shard {self.urls[shard]}", "read"):
                    found[place] = os.pread(self._file(shard, path).fileno(), stop - start, start)
        if remote:
            shards, starts, stops = zip(*(sample_spans[place] for place in remote), strict=True)
            with wrap_io_errors(f"shard {self.urls[shards[0]]} or one read with it", "read"):
                filesystem = url_to_fs(self.urls[shards[0]])[0]
                paths = [url_to_fs(self.urls[shard])[1] for shard in shards]
                data = filesystem.cat_ranges(paths, list(starts), list(stops), on_error="raise")
                found.update(zip(remote, data, strict=True))
        return [found[place] for place in range(len(sample_spans))]

    def _file(self, shard: int, path: str) -> IO[bytes]:
        """A shard's open file. Positions are given with each read, so threads and forks may share it; the one opened
        first closes when nobody reads it any more."""
        file = self._files.get(shard)
        if file is None:
            file = self._files[shard] = open(path, "rb", buffering=0)  # noqa: SIM115  # stays open
            if len(self._files) > OPEN_FILES:
                self._files.popitem(last=False)
        return file

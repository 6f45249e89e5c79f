"""Room `storage`: WebDataset shards: finding them, listing their samples, reading any sample's bytes."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator, Sequence
from typing import IO, Any

import fsspec
import polars as pl
from webdataset.shardlists import expand_urls
from webdataset.tariterators import base_plus_ext

from storage.errors import StorageError
from storage.root import explained

BLOCK = tarfile.BLOCKSIZE
COLUMNS = {
    "sample": pl.UInt32,
    "key": pl.String,
    "shard": pl.UInt32,
    "names": pl.List(pl.String),
    "begins": pl.List(pl.UInt64),
    "offsets": pl.List(pl.UInt64),
    "sizes": pl.List(pl.UInt64),
}


def expand(shards: str | Sequence[str]) -> list[str]:
    """Paths or URLs from WebDataset's brace notation.

    Raises:
        StorageError: one of them does not exist.
    """
    patterns = [shards] if isinstance(shards, str) else list(shards)
    urls = [url for pattern in patterns for url in expand_urls(pattern)]
    for url in urls:
        with explained(f"shard {url}", "looked for"):
            filesystem, path = fsspec.core.url_to_fs(url)
            if not filesystem.exists(path):
                raise StorageError(f"shard {url} does not exist; check `shards` in the plan")
    if not urls:
        raise StorageError("`shards` names no shard; give a path or a brace pattern")
    return urls


def index_shards(urls: Sequence[str]) -> pl.DataFrame:
    """One row a sample, in shard order: its `key`, `shard` (position in `urls`), and of each member its extension
    (`names`), where its header begins (`begins`), where its payload is (`offsets`) and its size in bytes (`sizes`).

    Raises:
        StorageError: a shard is no tar, is truncated or compressed, or a key is there twice.
    """
    rows: list[dict[str, Any]] = []
    for number, url in enumerate(urls):
        rows += ({"shard": number, **sample} for sample in _samples(url))
    frame = pl.DataFrame([{"sample": i, **row} for i, row in enumerate(rows)], schema=COLUMNS)
    repeated = frame.filter(pl.col("key").is_duplicated()).sort("key", "sample")
    if len(repeated):
        key, places = repeated["key"][0], repeated.filter(pl.col("key") == repeated["key"][0])["shard"].to_list()
        raise StorageError(
            f"key {key} is there twice, in {urls[places[0]]} and in {urls[places[1]]}, with {repeated['key'].n_unique()} "
            f"keys repeated in all; give every sample a key of its own"
        )
    return frame


def _samples(url: str) -> Iterator[dict[str, Any]]:
    """The samples of one shard: consecutive members that share a key, as WebDataset groups them."""
    sample: dict[str, Any] | None = None
    for member in _members(url):
        key, extension = base_plus_ext(member.name)
        if not key:
            continue
        try:
            member.name.encode()
        except UnicodeEncodeError as error:
            raise StorageError(f"shard {url} has a member whose name is not UTF-8 ({key!r}); rename it") from error
        if sample is None or sample["key"] != key:
            if sample:
                yield sample
            sample = {"key": key, "names": [], "begins": [], "offsets": [], "sizes": []}
        if extension.lower() in sample["names"]:
            raise StorageError(f"sample {key} of {url} has two members .{extension}; a key may hold each once")
        sample["names"].append(extension.lower())
        sample["begins"].append(member.offset)
        sample["offsets"].append(member.offset_data)
        sample["sizes"].append(member.size)
    if sample:
        yield sample


def _members(url: str) -> Iterator[tarfile.TarInfo]:
    """The regular files of a tar, to its very end."""
    with explained(f"shard {url}", "read"), fsspec.open(url, "rb") as file:
        try:
            end = 0
            with tarfile.open(fileobj=file, mode="r:") as archive:
                for member in archive:
                    archive.members = []  # tarfile would keep them all
                    end = member_end(member.offset_data, member.size)
                    if member.isfile():
                        yield member
                    elif not member.isdir():
                        raise StorageError(
                            f"shard {url} has a member {member.name} that is no regular file (a link or a device); remove it"
                        )
            file.seek(end)
            if file.read(BLOCK) != bytes(BLOCK):
                raise tarfile.ReadError(f"no end of archive at byte {end}")
        except tarfile.TarError as error:
            raise StorageError(
                f"shard {url} is truncated, compressed or no tar ({error}); write it anew, uncompressed"
            ) from error


def member_end(offset: int, size: int) -> int:
    """Where a member ends, padding included."""
    return offset + (size + BLOCK - 1) // BLOCK * BLOCK


class Samples:
    """Listed samples, read by row in any order; shards stay open between reads."""

    def __init__(self, urls: Sequence[str], frame: pl.DataFrame) -> None:
        self.urls, self.frame = list(urls), frame
        self._files: dict[tuple[int, int], IO[bytes]] = {}

    def __len__(self) -> int:
        return len(self.frame)

    def read(self, rows: Sequence[int]) -> list[dict[str, Any]]:
        """The samples at `rows`: `__key__`, and the bytes of each member by extension."""
        read = []
        for row in self.frame[list(rows)].iter_rows(named=True):
            file, start = self._file(row["shard"]), row["begins"][0]
            with explained(f"shard {self.urls[row['shard']]}", "read"):
                file.seek(start)
                data = file.read(row["offsets"][-1] + row["sizes"][-1] - start)
            sample: dict[str, Any] = {"__key__": row["key"]}
            for name, offset, size in zip(row["names"], row["offsets"], row["sizes"], strict=True):
                sample[name] = data[offset - start : offset - start + size]
            read.append(sample)
        return read

    def keys(self, rows: Sequence[int]) -> list[str]:
        """The keys of some rows."""
        return self.frame["key"][list(rows)].to_list()

    def shard_of(self, key: str) -> str:
        """Path or URL of the shard that holds a key."""
        return self.urls[self.frame.filter(pl.col("key") == key)["shard"][0]]

    def _file(self, shard: int) -> IO[bytes]:
        """A shard's open file; a process opens its own, for a fork shares file positions."""
        place = os.getpid(), shard
        if place not in self._files:
            with explained(f"shard {self.urls[shard]}", "read"):
                self._files[place] = fsspec.open(self.urls[shard], "rb").open()
        return self._files[place]

"""WebDataset shards: their URLs, and the bytes of any listed sample."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Sequence
from typing import IO, Any, NamedTuple

import polars as pl
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem
from webdataset.shardlists import expand_urls

from secateur.errors import StorageError
from secateur.storage.io_errors import wrap_io_errors
from secateur.storage.sample_hashes import check_sample_hash
from secateur.storage.tars import shard_exists
from secateur.storage.urls import check_url

MAX_OPEN_FILES = 128


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

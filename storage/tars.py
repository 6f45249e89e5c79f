"""Room `storage`: walking a shard's tar to its very end, so that no loss goes unseen."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, cast

from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from secateur.errors import StorageError
from secateur.storage.folder import wrap_io_errors

BLOCK = tarfile.BLOCKSIZE
BUFFER = 1 << 20
HEADER = 1 << 20  # the most that one header may take


@contextmanager
def open_shard(url: str) -> Iterator[IO[bytes]]:
    """A shard's bytes, from the start.

    Raises:
        StorageError: it cannot be read.
    """
    with wrap_io_errors(f"shard {url}", "read"):
        filesystem, path = url_to_fs(url)
        local = isinstance(filesystem, LocalFileSystem)
        with open(path, "rb") if local else filesystem.open(path, "rb") as file:
            yield cast(IO[bytes], file)


def shard_version(url: str) -> str:
    """What tells one version of a shard from the next: size, time and place of a file, the store's own tag of an object."""
    with wrap_io_errors(f"shard {url}", "read"):
        filesystem, path = url_to_fs(url)
        filesystem.invalidate_cache()
        return str(filesystem.ukey(path))


def iter_members(url: str) -> Iterator[tarfile.TarInfo]:
    """The regular files of a tar. Each has `offset` (of its first header), `offset_data` and `size`.

    Raises:
        StorageError: it is truncated, compressed, damaged or no tar, or has a member that is neither file nor folder.
    """
    with open_shard(url) as file:
        try:
            yield from _walk(file, url)
        except StorageError:
            raise
        except (tarfile.TarError, ValueError, OverflowError, RecursionError) as error:
            raise StorageError(
                f"shard {url} is truncated, damaged, compressed or no tar ({error}); write it anew, uncompressed"
            ) from error


def member_end(offset: int, size: int) -> int:
    """Where a member ends, padding included."""
    return offset + (size + BLOCK - 1) // BLOCK * BLOCK


def _walk(file: IO[bytes], url: str) -> Iterator[tarfile.TarInfo]:
    end, size = 0, file.seek(0, os.SEEK_END)
    file.seek(0)
    with tarfile.open(fileobj=cast(IO[bytes], _Headers(file)), mode="r:") as archive:
        for member in archive:
            archive.members = []  # type: ignore[attr-defined]  # tarfile would keep them all
            if member.offset < end:
                raise tarfile.ReadError(
                    f"a member begins at byte {member.offset}, within the one before"
                )
            end = archive.offset
            if end > size:
                raise tarfile.ReadError(f"it ends within the member at byte {member.offset}")
            if member.sparse is not None or not (member.isfile() or member.isdir()):
                raise StorageError(
                    f"shard {url} has a member {member.name!a} that is no regular file (a link, a device or a sparse file); "
                    f"write it anew without"
                )
            if member.isfile():
                yield member
    _check_end(file, end)


def _check_end(file: IO[bytes], end: int) -> None:
    """tarfile takes a header that it can't read for the end, and stops at the first end of archives put together."""
    file.seek(end)
    if file.read(BLOCK) != bytes(BLOCK):
        raise tarfile.ReadError(f"no end of archive at byte {end}")
    while data := file.read(BUFFER):
        if data.count(0) != len(data):
            raise tarfile.ReadError(f"there is more after the end of archive at byte {end}")


class _Headers:
    """A file of which only headers are read: tarfile would take memory for whatever size a header declares."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self.seek, self.tell = file, file.seek, file.tell

    def read(self, size: int) -> bytes:
        if size > HEADER:
            raise tarfile.ReadError(f"a header of {size} bytes at byte {self.tell()}")
        return self._file.read(size)

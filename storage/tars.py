"""Tar files of shards, read to their very end so that no loss stays unnoticed."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, cast

from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from secateur.errors import StorageError
from secateur.storage.io_errors import wrap_io_errors

BLOCK = tarfile.BLOCKSIZE
BUFFER = 1 << 20
MAX_HEADER = 1 << 20  # bytes that one header may take


@contextmanager
def open_shard(url: str) -> Iterator[IO[bytes]]:
    """Open a shard for reading.

    Raises:
        StorageError: the shard cannot be read.
    """
    with wrap_io_errors(f"shard {url}", "read"):
        filesystem, path = url_to_fs(url)
        local = isinstance(filesystem, LocalFileSystem)
        with open(path, "rb") if local else filesystem.open(path, "rb") as file:
            yield cast(IO[bytes], file)


def shard_exists(url: str) -> bool:
    """Check whether a shard exists."""
    with wrap_io_errors(f"shard {url}", "checked"):
        filesystem, path = url_to_fs(url)
        filesystem.invalidate_cache()
        return bool(filesystem.exists(path))


def shard_version(url: str) -> str:
    """Return a text that changes with the shard.

    It depends on size, time and inode of a file, or on the store's own tag (ETag) of an object.
    """
    with wrap_io_errors(f"shard {url}", "read"):
        filesystem, path = url_to_fs(url)
        filesystem.invalidate_cache()
        return str(filesystem.ukey(path))


def iter_members(url: str) -> Iterator[tarfile.TarInfo]:
    """Yield the regular files of a tar, with `offset` (of the first header), `offset_data`, `size`.

    Raises:
        StorageError: the tar is truncated, compressed, damaged or no tar, or it has a member that
            is neither a file nor a folder.
    """
    with open_shard(url) as file:
        try:
            yield from _walk(file, url)
        except StorageError:
            raise
        except (tarfile.TarError, ValueError, OverflowError, RecursionError) as error:
            raise StorageError(
                f"shard {url} is truncated, damaged, compressed or not a tar ({error}); "
                f"write it again, uncompressed"
            ) from error


def member_end(offset: int, size: int) -> int:
    """Return the byte after a member, including its padding.

    Args:
        offset: the first byte of the payload.
        size: bytes of the payload.
    """
    return offset + (size + BLOCK - 1) // BLOCK * BLOCK


def _walk(file: IO[bytes], url: str) -> Iterator[tarfile.TarInfo]:
    end = 0
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    with tarfile.open(fileobj=cast(IO[bytes], _HeaderFile(file)), mode="r:") as archive:
        for member in archive:
            # tarfile would keep all members in memory.
            archive.members = []  # type: ignore[attr-defined]
            if member.offset < end:
                raise tarfile.ReadError(
                    f"a member begins at byte {member.offset}, within the one before"
                )
            end = archive.offset
            if end > size:
                raise tarfile.ReadError(f"it ends within the member at byte {member.offset}")
            if member.sparse is not None or not (member.isfile() or member.isdir()):
                raise StorageError(
                    f"shard {url} has a member {member.name!a} that is not a regular file "
                    f"(a link, a device or a sparse file); write it again without that member"
                )
            if member.isfile():
                yield member
    _check_end(file, end)


def _check_end(file: IO[bytes], end: int) -> None:
    """Check that the archive ends with zeros only, from byte `end` on."""
    # tarfile takes an unreadable header for the end of the archive. It also stops at the first end
    # of several concatenated archives. Both would silently lose samples.
    file.seek(end)
    if file.read(BLOCK) != bytes(BLOCK):
        raise tarfile.ReadError(f"no end of archive at byte {end}")
    while data := file.read(BUFFER):
        if data.count(0) != len(data):
            raise tarfile.ReadError(f"there is data after the end of archive at byte {end}")


class _HeaderFile:
    """A file of which only headers are read, with a limit on the size of a header."""

    # tarfile would allocate any size that a header declares.

    def __init__(self, file: IO[bytes]) -> None:
        self.seek = file.seek
        self.tell = file.tell
        self._file = file

    def read(self, size: int) -> bytes:
        if size > MAX_HEADER:
            raise tarfile.ReadError(f"a header of {size} bytes at byte {self.tell()}")
        return self._file.read(size)

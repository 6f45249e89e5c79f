"""Checks of local files against the SHA-256 of their committed content."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

FileIdentity = tuple[int, int, int, int, str]


class ContentMismatch(Exception):
    """A file's content differs from the committed content."""


def check_file(path: Path, size: int, sha256: str) -> None:
    """Check the content of a local file by reading it.

    A process reads each file once, and again if its size or modification time has changed.

    Raises:
        ContentMismatch: the content is different.
        FileNotFoundError: the file does not exist.
    """
    identity = _file_identity(path, sha256)
    if identity in _checked_files:
        return
    if file_digest(path) != (size, sha256):
        raise ContentMismatch
    _checked_files.add(identity)


def file_digest(path: Path) -> tuple[int, str]:
    """Return the size in bytes and the SHA-256 of a local file."""
    with open(path, "rb") as file:
        return os.fstat(file.fileno()).st_size, hashlib.file_digest(file, "sha256").hexdigest()


def _file_identity(path: Path, sha256: str) -> FileIdentity:
    stat = path.stat()
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, sha256


_checked_files: set[FileIdentity] = set()

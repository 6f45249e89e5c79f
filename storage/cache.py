"""A bounded cache of files downloaded from a store, shared by all processes of a machine.

Each file is named by the SHA-256 of its content, so a damaged file is noticed and downloaded again.
The location and the size limit depend on the machine, so they are environment variables:
`SECATEUR_CACHE` (default `~/.cache/secateur`) and `SECATEUR_CACHE_BYTES` (default 50 GB).
"""

from __future__ import annotations

import fcntl
import os
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from secateur.errors import StorageError
from secateur.storage.file_check import ContentMismatch, check_file

DEFAULT_BYTES = 50_000_000_000
DRAFT_PREFIX = "draft-"

Download = Callable[[str], None]


class FileCache:
    """The cache that the environment variables describe.

    Raises:
        StorageError: the size limit in the environment is not a number.
    """

    def __init__(self) -> None:
        home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        self.folder = Path(os.environ.get("SECATEUR_CACHE") or f"{home}/secateur")
        limit = os.environ.get("SECATEUR_CACHE_BYTES") or str(DEFAULT_BYTES)
        if not limit.isdigit():
            raise StorageError(f"SECATEUR_CACHE_BYTES is {limit!r}; give a number of bytes")
        self.limit = int(limit)

    @contextmanager
    def open_cached(self, size: int, sha256: str, download: Download) -> Iterator[Path]:
        """Provide a file with this content. No process evicts it within the block.

        A memory map that is made within the block stays valid afterwards.

        Args:
            size: bytes of the content.
            sha256: SHA-256 of the content, in hexadecimal digits.
            download: writes the content to the path that it is given.

        Raises:
            StorageError: the file is larger than the cache.
            ContentMismatch: the downloaded content is different.
        """
        if size > self.limit:
            raise StorageError(
                f"a file of {size} bytes is more than the local cache {self.folder} may hold "
                f"({self.limit}); set SECATEUR_CACHE_BYTES higher"
            )
        path = self.folder / sha256
        self.folder.mkdir(parents=True, exist_ok=True)
        with self._locked(fcntl.LOCK_SH):
            cached = _has_content(path, size, sha256)
        if not cached:
            self._add(path, size, sha256, download)
        with self._locked(fcntl.LOCK_SH):
            # Another process that needed space may have evicted the file in between.
            if not path.exists():
                self._download(path, size, sha256, download)
            # Eviction goes by the time of the last use.
            os.utime(path)
            yield path

    def _add(self, path: Path, size: int, sha256: str, download: Download) -> None:
        """Download a file, and evict others to stay within the limit."""
        with self._locked(fcntl.LOCK_EX):
            self._evict(size, path)
        self._download(path, size, sha256, download)
        # Other processes may have downloaded at the same time.
        with self._locked(fcntl.LOCK_EX):
            self._evict(0, path)

    def _download(self, path: Path, size: int, sha256: str, download: Download) -> None:
        """Download to a draft, and rename it once its content is checked."""
        # The lock on the draft lasts while its writer lives. So the draft of a killed process is
        # recognized, and evicted.
        draft = self.folder / f"{DRAFT_PREFIX}{uuid.uuid4().hex}"
        with ExitStack() as stack:
            # Under the shared lock, no process evicts the draft before it is locked itself.
            with self._locked(fcntl.LOCK_SH):
                fcntl.flock(stack.enter_context(open(draft, "xb")), fcntl.LOCK_EX)
            try:
                download(str(draft))
                check_file(draft, size, sha256)
                os.replace(draft, path)
            finally:
                with suppress(FileNotFoundError):
                    os.unlink(draft)

    def _evict(self, needed: int, spared: Path) -> None:
        """Remove the least recently used files until `needed` more bytes fit."""
        entries = []
        for path in self.folder.iterdir():
            # A draft may be renamed while this loop runs.
            with suppress(FileNotFoundError):
                entries.append((path.stat(), path))
        entries.sort(key=lambda entry: entry[0].st_mtime)
        excess = sum(stat.st_size for stat, _ in entries) + needed - self.limit
        for stat, path in entries:
            if excess <= 0:
                return
            if path not in (spared, self._lock) and not _is_being_written(path):
                path.unlink(missing_ok=True)
                excess -= stat.st_size

    @property
    def _lock(self) -> Path:
        return self.folder / "lock"

    @contextmanager
    def _locked(self, kind: int) -> Iterator[None]:
        with open(self._lock, "ab") as file:
            fcntl.flock(file, kind)
            yield


def _is_being_written(path: Path) -> bool:
    """Check whether a file is a draft whose writer still lives."""
    if not path.name.startswith(DRAFT_PREFIX):
        return False
    with suppress(FileNotFoundError), open(path, "rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def _has_content(path: Path, size: int, sha256: str) -> bool:
    """Check whether a local file exists with this content."""
    try:
        check_file(path, size, sha256)
    except (ContentMismatch, FileNotFoundError):
        return False
    return True

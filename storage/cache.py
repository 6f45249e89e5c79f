"""Room `storage`: a bounded folder of files fetched from a store, which all processes of a machine share.

Files are named by the sha256 of their content, so that one which isn't what its name says is fetched anew. Where the
folder is and how much it may hold are matters of the machine, so the environment says them: `SECATEUR_CACHE` (default
`~/.cache/secateur`) and `SECATEUR_CACHE_BYTES` (default 50 GB).
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from secateur.errors import StorageError

BYTES = 50_000_000_000


class ContentMismatch(Exception):
    """A file's content is not what was committed."""


class FileCache:
    """The cache that the environment names.

    Raises:
        StorageError: the environment's limit is no number.
    """

    def __init__(self) -> None:
        home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        self.folder = Path(os.environ.get("SECATEUR_CACHE") or f"{home}/secateur")
        limit = os.environ.get("SECATEUR_CACHE_BYTES") or str(BYTES)
        if not limit.isdigit():
            raise StorageError(f"SECATEUR_CACHE_BYTES is {limit!r}; give a number of bytes")
        self.limit = int(limit)

    @contextmanager
    def open_cached(self, size: int, sha256: str, fetch: Callable[[str], None]) -> Iterator[Path]:
        """A file with this content, which no process evicts within the block; what is mapped in it stays mapped after.

        Args:
            fetch: writes the file to a path.

        Raises:
            StorageError: the file is larger than the cache.
            NotCommitted: what was fetched has another content.
        """
        if size > self.limit:
            raise StorageError(
                f"a file of {size} bytes is more than the local cache {self.folder} may hold ({self.limit}); set "
                f"SECATEUR_CACHE_BYTES higher"
            )
        path = self.folder / sha256
        self.folder.mkdir(parents=True, exist_ok=True)
        with self._locked(fcntl.LOCK_SH):
            whole = self._whole(path, size, sha256)
        if not whole:
            self._fetch(path, size, sha256, fetch)
        with self._locked(fcntl.LOCK_SH):
            if not path.exists():  # evicted in between by a process in need
                self._take(path, size, sha256, fetch)
            os.utime(path)
            yield path

    def _fetch(self, path: Path, size: int, sha256: str, fetch: Callable[[str], None]) -> None:
        with self._locked(fcntl.LOCK_EX):
            self._evict(size, path)
        self._take(path, size, sha256, fetch)
        with self._locked(fcntl.LOCK_EX):
            self._evict(0, path)  # others may have fetched at the same time

    def _take(self, path: Path, size: int, sha256: str, fetch: Callable[[str], None]) -> None:
        """Fetches into a draft, and gives it its name once it is what it should be. A draft is locked while somebody
        writes it, so that one whose writer was killed is known, and makes room."""
        draft = self.folder / f"draft-{uuid.uuid4().hex}"
        with ExitStack() as held:
            with self._locked(fcntl.LOCK_SH):  # nobody evicts before the draft is locked
                fcntl.flock(held.enter_context(open(draft, "xb")), fcntl.LOCK_EX)
            try:
                fetch(str(draft))
                if file_digest(draft) != (size, sha256):
                    raise ContentMismatch
                _whole_before.add(_identity(draft, sha256))
                os.replace(draft, path)
            finally:
                with suppress(FileNotFoundError):
                    os.unlink(draft)

    def _evict(self, wanted: int, spared: Path) -> None:
        """Removes the files unused for longest until `wanted` more bytes fit."""
        found = []
        for path in self.folder.iterdir():
            with suppress(FileNotFoundError):  # a draft that was given its name meanwhile
                found.append((path.stat(), path))
        found.sort(key=lambda f: f[0].st_mtime)
        excess = sum(stat.st_size for stat, _ in found) + wanted - self.limit
        for stat, path in found:
            if excess <= 0:
                return
            if path not in (spared, self._lock) and not _in_use(path):
                path.unlink(missing_ok=True)
                excess -= stat.st_size

    def _whole(self, path: Path, size: int, sha256: str) -> bool:
        try:
            check_file(path, size, sha256)
        except (ContentMismatch, FileNotFoundError):
            return False
        return True

    @property
    def _lock(self) -> Path:
        return self.folder / "lock"

    @contextmanager
    def _locked(self, kind: int) -> Iterator[None]:
        with open(self._lock, "ab") as file:
            fcntl.flock(file, kind)
            yield


def _in_use(path: Path) -> bool:
    """Whether a file is a draft that somebody writes."""
    if not path.name.startswith("draft-"):
        return False
    with suppress(FileNotFoundError), open(path, "rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def check_file(path: Path, size: int, sha256: str) -> None:
    """Rereads a local file, once a process while its size and time of change stay.

    Raises:
        NotCommitted: its content is another.
        FileNotFoundError: it isn't there.
    """
    identity = _identity(path, sha256)
    if identity in _whole_before:
        return
    if file_digest(path) != (size, sha256):
        raise ContentMismatch
    _whole_before.add(identity)


def file_digest(path: Path) -> tuple[int, str]:
    """Size and sha256 of a local file."""
    with open(path, "rb") as file:
        return os.fstat(file.fileno()).st_size, hashlib.file_digest(file, "sha256").hexdigest()


def _identity(path: Path, sha256: str) -> tuple[int, int, int, int, str]:
    stat = path.stat()
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, sha256


_whole_before: set[tuple[int, int, int, int, str]] = set()

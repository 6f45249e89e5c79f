"""Room `storage`: folders, local or remote, through fsspec."""

from __future__ import annotations

import errno
import os
import uuid
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, cast

from botocore.exceptions import (  # type: ignore[import-untyped]
    BotoCoreError,
    ConnectionError,
    HTTPClientError,
)
from fsspec import AbstractFileSystem
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from secateur.errors import StorageError, UnavailableError
from secateur.storage.retry_log import show_retries
from secateur.storage.urls import check_url, redact_credentials

REMEDIES = {
    errno.ENOSPC: "free some space and run the same command again",
    errno.EDQUOT: "free some space and run the same command again",
    errno.EACCES: "check its permissions, or the credentials of the store",
    errno.EPERM: "check its permissions, or the credentials of the store",
    errno.EISDIR: "it is a folder; name a file",
    errno.ENOTDIR: "a part of its path is a file; choose another path",
}
PASSING = {  # s3fs gives a store's own failures as EREMOTEIO, EBUSY, EIO, or without a number
    None, errno.EIO, errno.EBUSY, errno.EAGAIN, errno.ESTALE, errno.ETIMEDOUT, errno.ECONNRESET, errno.ECONNREFUSED,
    errno.ECONNABORTED, errno.EPIPE, errno.EHOSTUNREACH, errno.ENETUNREACH, errno.EREMOTEIO,
}  # fmt: skip


class Folder:
    """A folder at a local path or a URL (`s3://bucket/prefix`); it need not exist yet.

    Raises:
        StorageError: the URL holds credentials.
    """

    def __init__(self, url: str) -> None:
        check_url(url)
        self.url = url.rstrip("/") or "/"
        self._path: str = url_to_fs(self.url)[1]
        if not self.is_local:
            show_retries()

    def child(self, *parts: str) -> Folder:
        """A folder within."""
        return Folder("/".join((self.url, *parts)))

    @property
    def is_local(self) -> bool:
        """Whether files can be opened in place."""
        return isinstance(self._fs, LocalFileSystem)

    def url_of(self, name: str) -> str:
        """Path or URL of a file within."""
        return f"{self.url}/{name}"

    @contextmanager
    def open(self, name: str, mode: str = "rb") -> Iterator[IO[bytes]]:
        """Opens a file within; folders are made as needed.

        Raises:
            StorageError: it cannot be read or written (missing, full, forbidden).
        """
        with wrap_io_errors(self.url_of(name), "read" if "r" in mode else "written"):
            if not self.is_local:
                with self._fs.open(self._at(name), mode) as file:
                    yield cast(IO[bytes], file)
                return
            if "r" not in mode:
                os.makedirs(os.path.dirname(self._at(name)), exist_ok=True)
            with cast(IO[bytes], open(self._at(name), mode)) as file:
                yield file

    def read_bytes(self, name: str) -> bytes:
        """A whole file."""
        with self.open(name) as file:
            return file.read()

    def exists(self, name: str) -> bool:
        """Whether a file is there now; nothing is remembered."""
        if self.is_local:
            return os.path.exists(self._at(name))
        with wrap_io_errors(self.url_of(name), "looked for"):
            self._fs.invalidate_cache()
            return bool(self._fs.exists(self._at(name)))

    def create(self, name: str, data: bytes) -> None:
        """Writes a file, whole or not at all, unless it is there already.

        Raises:
            FileExistsError: another writer was first.
        """
        with wrap_io_errors(self.url_of(name), "written"):
            if self.is_local:
                self._link(self._at(name), data)
                return
            try:
                self._fs.pipe_file(self._at(name), data, mode="create")
            except OSError as error:
                if _refused(error):
                    raise FileExistsError(self.url_of(name)) from error
                raise

    def supports_conditional_put(self) -> bool:
        """Whether the disk or store refuses to create what is there already, tried with a small file: some stores ignore
        conditional puts without a word, and then nothing tells the second of two writers that it came second."""
        name = f"probe-{uuid.uuid4().hex}"
        with suppress(
            FileExistsError
        ):  # the answer was lost, and a second try found what the first had made
            self.create(name, b"first")
        try:
            self.create(name, b"second")
        except FileExistsError:
            return True
        finally:
            self.remove(name)
        return False

    def files(self) -> list[str]:
        """Every file within, however deep, relative, sorted."""
        return sorted(self._found())

    def sizes(self) -> dict[str, int]:
        """The size of every file within, in bytes."""
        return {name: int(found["size"]) for name, found in self._found().items()}

    def link_or_copy(self, source: Folder, name: str) -> None:
        """Puts a file of another folder of the same disk or store into this one under its name, its bytes unmoved: linked
        on the disk, copied by the store itself elsewhere."""
        with wrap_io_errors(self.url_of(name), "written"):
            if self.is_local:
                os.makedirs(os.path.dirname(self._at(name)), exist_ok=True)
                os.link(source._at(name), self._at(name))
            else:
                self._fs.copy(source._at(name), self._at(name))

    def remove(self, name: str) -> None:
        """Removes a file within, if it is there."""
        with wrap_io_errors(self.url_of(name), "removed"), suppress(FileNotFoundError):
            self._fs.rm_file(self._at(name))

    def delete(self) -> None:
        """Removes the folder and all in it."""
        with wrap_io_errors(self.url, "removed"), suppress(FileNotFoundError):
            self._fs.invalidate_cache()
            self._fs.rm(self._path, recursive=True)

    def fsync(self, names: Iterable[str]) -> None:
        """Waits until written files, and the folders that name them, are on the disk itself, to outlive a power cut; a
        store answers for its own."""
        if self.is_local:
            paths = [self.local_path(name) for name in names]
            with wrap_io_errors(self.url, "written"), ThreadPoolExecutor(4) as pool:
                list(pool.map(_sync, paths))
                list(pool.map(_sync_folder, {folder for path in paths for folder in path.parents}))

    def local_path(self, name: str) -> Path:
        """Where a file within is on this machine; only a local folder can say."""
        return Path(self._at(name))

    def download(self, name: str, path: str) -> None:
        """Copies a file within to a local path."""
        with wrap_io_errors(self.url_of(name), "read"):
            self._fs.get_file(self._at(name), path)

    def _found(self) -> dict[str, dict[str, Any]]:
        if self.is_local and not os.path.isdir(self._path):
            return {}
        with wrap_io_errors(self.url, "listed"):
            self._fs.invalidate_cache()
            found = cast(dict[str, dict[str, Any]], self._fs.find(self._path, detail=True))
        within = self._at("")  # a store may list an emptied folder as a file of its own name
        return {
            n.removeprefix(within): facts
            for n, facts in found.items()
            if n.startswith(within) and n != within
        }

    @property
    def _fs(self) -> AbstractFileSystem:
        """This process's connection: fsspec keeps one a process, for it does not survive a fork."""
        return url_to_fs(self.url)[0]

    def _at(self, name: str) -> str:
        return f"{self._path.rstrip('/')}/{name}"

    @staticmethod
    def _link(path: str, data: bytes) -> None:
        """A file that appears at once, by a hard link to one written beside it."""
        os.makedirs(os.path.dirname(path), exist_ok=True)
        draft = f"{path}.{uuid.uuid4().hex}"
        try:
            with open(draft, "xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.link(draft, path)
            _sync_folder(Path(path).parent)
        finally:
            with suppress(FileNotFoundError):
                os.unlink(draft)


def _sync(path: Path) -> None:
    """Waits until a file or folder is on the disk itself."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sync_folder(path: Path) -> None:
    """The same of a folder, which may be another user's, or on a file system that cannot."""
    with suppress(OSError):
        _sync(path)


@contextmanager
def wrap_io_errors(what: str, verb: str) -> Iterator[None]:
    """Turns the operating system's or the store's errors about a file into one sentence."""
    try:
        yield
    except (FileExistsError, StorageError):
        raise
    except FileNotFoundError as error:
        raise StorageError(
            f"{what} does not exist; check the path and that the run got so far"
        ) from error
    except (OSError, BotoCoreError) as error:
        number, reason = getattr(error, "errno", None), getattr(error, "strerror", None) or error
        remedy = REMEDIES.get(
            number or 0, "check the disk or the connection and run the same command again"
        )
        told = " ".join(redact_credentials(str(reason)).split())
        cause = (
            error if redact_credentials(str(error)) == str(error) else None
        )  # its text would stand in a traceback
        raise _kind(error, number)(f"{what} cannot be {verb}: {told}; {remedy}") from cause


def _kind(error: BaseException, number: int | None) -> type[StorageError]:
    """Whether the cause can pass by itself: it is the connection's or the store's, not the request's."""
    if isinstance(error, BotoCoreError):
        return (
            UnavailableError
            if isinstance(error, (ConnectionError, HTTPClientError))
            else StorageError
        )
    forbidden = isinstance(error, PermissionError)  # s3fs gives no number with it
    return UnavailableError if number in PASSING and not forbidden else StorageError


def _refused(error: BaseException) -> bool:
    """Whether a store refused a conditional write because the object exists; servers say so in their own ways."""
    cause: Any = error.__cause__
    code = getattr(cause, "response", {}).get("Error", {}).get("Code")
    return isinstance(error, FileExistsError) or code == "PreconditionFailed"

"""Folders on a local disk or in an S3 store, through fsspec."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, cast

from fsspec import AbstractFileSystem
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from secateur.storage.io_errors import is_refused_put, wrap_io_errors
from secateur.storage.local_files import create_file, fsync_file, fsync_folder
from secateur.storage.retry_log import show_retries
from secateur.storage.urls import check_url


class Folder:
    """A folder at a local path or a URL (`s3://bucket/prefix`). It need not exist yet.

    Attributes:
        url: the path or URL, without a slash at its end.
        is_local: whether files can be opened in place.

    Raises:
        StorageError: the URL contains credentials.
    """

    def __init__(self, url: str) -> None:
        check_url(url)
        self.url = url.rstrip("/") or "/"
        filesystem, path = url_to_fs(self.url)
        self.is_local = isinstance(filesystem, LocalFileSystem)
        self._path: str = path
        if not self.is_local:
            show_retries()

    def child(self, *parts: str) -> Folder:
        """Return a folder within this one."""
        return Folder("/".join((self.url, *parts)))

    def url_of(self, name: str) -> str:
        """Return the path or URL of a file."""
        return f"{self.url}/{name}"

    def local_path(self, name: str) -> Path:
        """Return the path of a file on this machine. The folder must be local."""
        return Path(self._path_of(name))

    @contextmanager
    def open(self, name: str, mode: str = "rb") -> Iterator[IO[bytes]]:
        """Open a file. Folders are created as needed.

        Raises:
            StorageError: the file cannot be read or written (missing, disk full, forbidden).
        """
        with wrap_io_errors(self.url_of(name), "read" if "r" in mode else "written"):
            if not self.is_local:
                with self._filesystem.open(self._path_of(name), mode) as file:
                    yield cast(IO[bytes], file)
                return
            if "r" not in mode:
                os.makedirs(os.path.dirname(self._path_of(name)), exist_ok=True)
            with cast(IO[bytes], open(self._path_of(name), mode)) as file:
                yield file

    def read_bytes(self, name: str) -> bytes:
        """Return the content of a file."""
        with self.open(name) as file:
            return file.read()

    def exists(self, name: str) -> bool:
        """Check whether a file exists now."""
        if self.is_local:
            return os.path.exists(self._path_of(name))
        with wrap_io_errors(self.url_of(name), "checked"):
            # s3fs caches listings, but other processes write meanwhile.
            self._filesystem.invalidate_cache()
            return bool(self._filesystem.exists(self._path_of(name)))

    def create(self, name: str, data: bytes) -> None:
        """Write a whole file, or nothing if the file exists already.

        Raises:
            FileExistsError: another writer was first.
        """
        with wrap_io_errors(self.url_of(name), "written"):
            if self.is_local:
                create_file(self._path_of(name), data)
                return
            try:
                # A conditional put: the store creates the object only if there is none.
                self._filesystem.pipe_file(self._path_of(name), data, mode="create")
            except OSError as error:
                if is_refused_put(error):
                    raise FileExistsError(self.url_of(name)) from error
                raise

    def supports_conditional_put(self) -> bool:
        """Check with a small file that an existing file is not created again.

        Some stores silently ignore the condition of a put. With such a store, the second of two
        writers cannot notice that it came second.
        """
        name = f"probe-{uuid.uuid4().hex}"
        # A lost answer makes the client try again, and the second try finds its own file.
        with suppress(FileExistsError):
            self.create(name, b"first")
        try:
            self.create(name, b"second")
        except FileExistsError:
            return True
        finally:
            self.remove(name)
        return False

    def files(self) -> list[str]:
        """Return the relative names of all files within, at any depth, sorted."""
        return sorted(self._list_files())

    def sizes(self) -> dict[str, int]:
        """Return the size in bytes of every file within, by name."""
        return {name: int(entry["size"]) for name, entry in self._list_files().items()}

    def link_or_copy(self, source: Folder, name: str) -> None:
        """Add a file of another folder of the same disk or store, under the same name.

        The bytes are not moved through this process: a disk links the file, a store copies it.
        """
        with wrap_io_errors(self.url_of(name), "written"):
            if self.is_local:
                os.makedirs(os.path.dirname(self._path_of(name)), exist_ok=True)
                os.link(source._path_of(name), self._path_of(name))
            else:
                self._filesystem.copy(source._path_of(name), self._path_of(name))

    def download(self, name: str, path: str) -> None:
        """Copy a file to a local path."""
        with wrap_io_errors(self.url_of(name), "read"):
            self._filesystem.get_file(self._path_of(name), path)

    def remove(self, name: str) -> None:
        """Remove a file, if it exists."""
        with wrap_io_errors(self.url_of(name), "removed"), suppress(FileNotFoundError):
            self._filesystem.rm_file(self._path_of(name))

    def delete(self) -> None:
        """Remove the folder with everything in it."""
        with wrap_io_errors(self.url, "removed"), suppress(FileNotFoundError):
            self._filesystem.invalidate_cache()
            self._filesystem.rm(self._path, recursive=True)

    def fsync(self, names: Iterable[str]) -> None:
        """Wait until written files would survive a power cut.

        The files and all folders above them are flushed to the disk. For a store this does nothing:
        it confirms a file only once it has stored it.
        """
        if not self.is_local:
            return
        paths = [self.local_path(name) for name in names]
        # A file's name is part of its folder, and survives only if the folder is flushed too.
        folders = {folder for path in paths for folder in path.parents}
        with wrap_io_errors(self.url, "written"), ThreadPoolExecutor(4) as pool:
            list(pool.map(fsync_file, paths))
            list(pool.map(fsync_folder, folders))

    def _list_files(self) -> dict[str, dict[str, Any]]:
        """Return fsspec's entry of every file within, by relative name."""
        if self.is_local and not os.path.isdir(self._path):
            return {}
        with wrap_io_errors(self.url, "listed"):
            self._filesystem.invalidate_cache()
            entries = self._filesystem.find(self._path, detail=True)
        # A store may list an emptied folder as a file with the folder's own name.
        prefix = self._path_of("")
        return {
            path.removeprefix(prefix): entry
            for path, entry in cast(dict[str, dict[str, Any]], entries).items()
            if path.startswith(prefix) and path != prefix
        }

    @property
    def _filesystem(self) -> AbstractFileSystem:
        """The connection of this process."""
        # Not kept on the object: a connection does not survive a fork, and fsspec keeps one per
        # process.
        return url_to_fs(self.url)[0]

    def _path_of(self, name: str) -> str:
        return f"{self._path.rstrip('/')}/{name}"

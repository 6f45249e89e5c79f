"""The commit protocol: an output counts as written once its manifest exists."""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from secateur.errors import StorageError
from secateur.storage.attempt import REMOVED, Attempt
from secateur.storage.cache import FileCache
from secateur.storage.file_check import ContentMismatch, check_file
from secateur.storage.folder import Folder
from secateur.storage.io_errors import wrap_io_errors
from secateur.storage.manifest import (
    MANIFEST_FILE,
    Manifest,
    parse_manifest,
    serialize_manifest,
)


class Output:
    """A folder that counts as written once it holds a manifest, and never changes afterwards.

    Only single files may be removed from it, each of which leaves a mark.
    """

    def __init__(self, root: Folder) -> None:
        self.root = root
        self._manifest: Manifest | None = None

    @property
    def committed(self) -> bool:
        """Whether the manifest exists."""
        return self._manifest is not None or self.root.exists(MANIFEST_FILE)

    @property
    def manifest(self) -> Manifest:
        """The manifest.

        Raises:
            StorageError: the output is not committed, or its manifest is damaged.
        """
        if self._manifest is None:
            if not self.committed:
                raise StorageError(
                    f"{self.root.url} is not written yet; the step that writes it has not finished"
                )
            data = self.root.read_bytes(MANIFEST_FILE)
            self._manifest = parse_manifest(data, self.root.url_of(MANIFEST_FILE))
        return self._manifest

    @property
    def fingerprint(self) -> str:
        """The fingerprint of the content, see `Manifest.fingerprint`."""
        return self.manifest.fingerprint

    def names(self) -> list[str]:
        """Return the names of the files, sorted."""
        return sorted(self.manifest.files)

    def read(self, name: str) -> bytes:
        """Return the content of a file.

        Raises:
            StorageError: the file differs from the one that was committed.
        """
        entry = self._manifest_entry(name)
        data = self.files().read_bytes(name)
        if len(data) != entry["size"] or hashlib.sha256(data).hexdigest() != entry["sha256"]:
            raise self._damaged_error(name)
        return data

    @contextmanager
    def local(self, name: str) -> Iterator[Path]:
        """Provide a local file with the content, to map into memory within the block.

        The path is the file itself if the output is on a local disk, and else a cached copy.

        Raises:
            StorageError: the file differs from the one that was committed.
        """
        entry = self._manifest_entry(name)
        size = entry["size"]
        sha256 = entry["sha256"]
        files = self.files()
        try:
            if files.is_local:
                path = files.local_path(name)
                with wrap_io_errors(self.url(name), "read"):
                    check_file(path, size, sha256)
                yield path
                return
            with FileCache().open_cached(size, sha256, lambda p: files.download(name, p)) as path:
                yield path
        except ContentMismatch as error:
            raise self._damaged_error(name) from error

    def url(self, name: str) -> str:
        """Return the path or URL of a file."""
        self._manifest_entry(name)
        return self.files().url_of(name)

    def files(self) -> Folder:
        """Return the folder that holds the files."""
        return self.root.child(self.manifest.attempt)

    def remove_file(self, name: str) -> None:
        """Remove one of the committed files, and leave a mark that this was on purpose.

        The manifest stays as it is. Calling it again finishes a removal that was interrupted.
        """
        self._manifest_entry(name)
        # The mark goes first: a file that is missing without one would be damage.
        with suppress(FileExistsError):
            self.files().create(f"{name}{REMOVED}", b"")
        self.files().remove(name)

    def is_removed(self, name: str) -> bool:
        """Return whether a committed file was removed on purpose."""
        self._manifest_entry(name)
        return self.files().exists(f"{name}{REMOVED}")

    def remove(self) -> None:
        """Remove the committed files and the manifest, but no file that an attempt is writing."""
        if not self.committed:
            return
        files = self.files()
        self._manifest = None
        # The manifest goes first: a manifest without its files would be a damaged output.
        self.root.remove(MANIFEST_FILE)
        files.delete()

    def write_once(
        self, kind: str, inputs: dict[str, str], write: Callable[[Attempt], None]
    ) -> Manifest:
        """Write and commit the output, unless it is committed already.

        Args:
            kind: the name of the sort of output, such as `scores`.
            inputs: fingerprints of the outputs that this one is computed from, by a short name.
            write: writes the files to the attempt that it is given.

        Returns:
            The manifest of the committed output. If another process committed first, it is theirs.
        """
        if not self.committed:
            with self.attempt(kind, inputs) as attempt:
                write(attempt)
        return self.manifest

    @contextmanager
    def attempt(self, kind: str, inputs: dict[str, str]) -> Iterator[Attempt]:
        """Open an attempt, and commit the files written within the block at the end of the block.

        If another attempt commits first, its files count and the files of this one are removed.
        They are also removed if the block raises.
        """
        name = uuid.uuid4().hex[:12]
        attempt = Attempt(self.root.child(name))
        try:
            yield attempt
            attempt.check_files()
            attempt.root.fsync(attempt.files.keys() - attempt.removed)
            manifest = Manifest(kind, name, attempt.files, inputs, attempt.facts)
            data = serialize_manifest(manifest)
        except BaseException:
            with suppress(Exception):
                attempt.root.delete()
            raise
        self._commit(attempt, name, data)

    def _commit(self, attempt: Attempt, name: str, data: bytes) -> None:
        """Write the manifest, unless there is one already."""
        # A store may create the manifest although its answer is lost. The client then tries again
        # and finds a file, which is this attempt's own manifest. So the attempt's files are removed
        # only if the manifest is certainly another's.
        try:
            self.root.create(MANIFEST_FILE, data)
        except FileExistsError:
            if self.manifest.attempt != name:
                attempt.root.delete()
        except BaseException:
            with suppress(Exception):
                if self.root.is_local and not self.root.exists(MANIFEST_FILE):
                    attempt.root.delete()
            raise

    def _manifest_entry(self, name: str) -> dict[str, Any]:
        """Return the size and sha256 of a file.

        Raises:
            StorageError: the output has no such file.
        """
        entry = self.manifest.files.get(name)
        if entry is None:
            names = ", ".join(self.names()) or "no files"
            raise StorageError(f"{self.root.url} holds no {name}; it holds {names}")
        return entry

    def _damaged_error(self, name: str) -> StorageError:
        return StorageError(f"{self.url(name)} is damaged; restore it or run that step again")


def list_outputs(root: Folder) -> list[Output]:
    """Return every output below a folder that has a manifest, damaged or not."""
    manifests = [name for name in root.files() if name.rsplit("/", 1)[-1] == MANIFEST_FILE]
    return [Output(root.child(*name.split("/")[:-1])) for name in manifests]

"""Verification of the files that manifests list, and removal of files that no manifest lists."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass

from secateur.errors import StorageError
from secateur.storage.attempt import REMOVED
from secateur.storage.folder import Folder
from secateur.storage.manifest import MANIFEST_FILE
from secateur.storage.outputs import Output, list_outputs

CHUNK = 4 << 20


@dataclass(frozen=True)
class Finding:
    """A file that differs from the manifests.

    Attributes:
        what: `missing`, `changed`, `damaged` (a manifest) or `extra` (in no manifest).
        file: its name within the verified folder.
    """

    what: str
    file: str


def verify_folder(root: Folder) -> Iterator[Finding]:
    """Read every file of every output below a folder, and yield the differences from the manifests.

    Files that are in no manifest are yielded too. Files that were removed on purpose are not.
    """
    for output in list_outputs(root):
        place = _relative_place(root, output)
        try:
            manifest = output.manifest
        except StorageError:
            yield Finding("damaged", f"{place}/{MANIFEST_FILE}")
            continue
        for name in manifest.files:
            if (problem := check_output_file(output, name)) and not output.is_removed(name):
                yield Finding(problem, f"{place}/{manifest.attempt}/{name}")
    for name in find_stray_files(root):
        yield Finding("extra", name)


def check_output_file(output: Output, name: str) -> str | None:
    """Read a file of an output, and return `missing`, `changed`, or None if it is intact."""
    entry = output.manifest.files[name]
    files = output.files()
    if not files.exists(name):
        return "missing"
    intact = _file_digest(files, name) == (entry["size"], entry["sha256"])
    return None if intact else "changed"


def find_stray_files(root: Folder) -> list[str]:
    """Return the files below a folder that no manifest lists. Uncommitted attempts leave them.

    The files of an output whose manifest is damaged count as listed, because it cannot be known.
    """
    # Files are listed before manifests: a file that is committed in between is in a manifest then.
    files = root.files()
    listed: set[str] = set()
    unknown: list[str] = []
    for output in list_outputs(root):
        place = _relative_place(root, output)
        listed.add(f"{place}/{MANIFEST_FILE}")
        try:
            committed = _committed_files(place, output)
            listed |= committed | {f"{name}{REMOVED}" for name in committed}
        except StorageError:
            unknown.append(f"{place}/")
    return [name for name in files if name not in listed and not name.startswith(tuple(unknown))]


def remove_stray_files(root: Folder) -> list[str]:
    """Remove the files that `find_stray_files` returns.

    An attempt that runs at the same time loses its files, and ends with an error. If it commits at
    this very moment, its manifest is removed again.

    Returns:
        The removed files.
    """
    removed = find_stray_files(root)
    if not removed:
        return []
    for name in removed:
        root.remove(name)
    for output in list_outputs(root):
        with suppress(StorageError):
            if not _committed_files(_relative_place(root, output), output).isdisjoint(removed):
                output.root.remove(MANIFEST_FILE)
    return removed


def _relative_place(root: Folder, output: Output) -> str:
    """Return the path of an output within a folder."""
    return output.root.url.removeprefix(root.url).strip("/")


def _committed_files(place: str, output: Output) -> set[str]:
    """Return the names of an output's files within the folder that holds `place`."""
    manifest = output.manifest
    return {f"{place}/{manifest.attempt}/{name}" for name in manifest.files}


def _file_digest(folder: Folder, name: str) -> tuple[int, str]:
    """Return the size in bytes and the SHA-256 of a file."""
    digest = hashlib.sha256()
    size = 0
    with folder.open(name) as file:
        while data := file.read(CHUNK):
            digest.update(data)
            size += len(data)
    return size, digest.hexdigest()

"""Room `storage`: rereading all that a folder's manifests promise, and finding what none of them names."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass

from secateur.errors import StorageError
from secateur.storage.folder import Folder
from secateur.storage.manifest import MANIFEST_FILE
from secateur.storage.outputs import Output, list_outputs

CHUNK = 4 << 20


@dataclass(frozen=True)
class Finding:
    """A file that isn't as a manifest says; `what` is `missing`, `changed`, `damaged` (a manifest) or `extra`."""

    what: str
    file: str


def verify_folder(root: Folder) -> Iterator[Finding]:
    """Rereads every file of every artefact below a folder, and names what differs from the manifests, and what is in
    none of them."""
    for artefact in list_outputs(root):
        place = artefact.root.url.removeprefix(root.url).strip("/")
        try:
            files, attempt = artefact.manifest.files, artefact.manifest.attempt
        except StorageError:
            yield Finding("damaged", f"{place}/{MANIFEST_FILE}")
            continue
        for name in files:
            if what := check_output_file(artefact, name):
                yield Finding(what, f"{place}/{attempt}/{name}")
    for name in find_stray_files(root):
        yield Finding("extra", name)


def check_output_file(artefact: Output, name: str) -> str | None:
    """Rereads a file of an artefact: `missing` or `changed`, or None where it is as the manifest says."""
    promised, file = artefact.manifest.files[name], f"{artefact.manifest.attempt}/{name}"
    if not artefact.root.exists(file):
        return "missing"
    whole = _digest(artefact.root, file) == (promised["size"], promised["sha256"])
    return None if whole else "changed"


def find_stray_files(root: Folder) -> list[str]:
    """Files below a folder that no manifest names: what attempts that never committed have left.

    Files of an artefact whose manifest is damaged count as named, for nobody can tell.
    """
    found = (
        root.files()
    )  # before the manifests: what is committed meanwhile is named by one of them
    kept: set[str] = set()
    unsure: list[str] = []
    for artefact in list_outputs(root):
        place = artefact.root.url.removeprefix(root.url).strip("/")
        kept.add(f"{place}/{MANIFEST_FILE}")
        try:
            kept |= {
                f"{place}/{artefact.manifest.attempt}/{name}" for name in artefact.manifest.files
            }
        except StorageError:
            unsure.append(f"{place}/")
    return [name for name in found if name not in kept and not name.startswith(tuple(unsure))]


def remove_stray_files(root: Folder) -> list[str]:
    """Removes what `stray` finds. An attempt that runs meanwhile loses its files: it ends with an error, or, where it
    commits at that very moment, its manifest is taken back.

    Returns:
        What was removed.
    """
    found = find_stray_files(root)
    for name in found:
        root.remove(name)
    for artefact in list_outputs(root) if found else []:
        place = artefact.root.url.removeprefix(root.url).strip("/")
        with suppress(StorageError):
            if any(
                f"{place}/{artefact.manifest.attempt}/{name}" in found
                for name in artefact.manifest.files
            ):
                artefact.root.remove(MANIFEST_FILE)
    return found


def _digest(root: Folder, name: str) -> tuple[int, str]:
    digest, size = hashlib.sha256(), 0
    with root.open(name) as file:
        while data := file.read(CHUNK):
            digest.update(data)
            size += len(data)
    return size, digest.hexdigest()

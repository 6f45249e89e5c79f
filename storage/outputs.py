"""Room `storage`: the commit protocol. An artefact exists once its manifest does; the manifest is written last."""

from __future__ import annotations

import hashlib
import json
import re
import uuid
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from secateur.errors import StorageError
from secateur.storage.cache import ContentMismatch, FileCache, check_file
from secateur.storage.folder import Folder, wrap_io_errors
from secateur.storage.hashing_writer import HashingWriter, hash_while_writing

FORMAT = 1
MANIFEST_FILE = "manifest.json"
ATTEMPT, SHA256 = re.compile("[0-9a-f]{12}"), re.compile("[0-9a-f]{64}")


@dataclass(frozen=True)
class Manifest:
    """What an artefact consists of.

    Attributes:
        files: `size` and `sha256` of each file, by name.
        attempt: the folder, within the artefact, that the files are in.
        inputs: fingerprints of the artefacts it was made from.
        facts: small figures about it.
    """

    kind: str
    attempt: str
    files: dict[str, dict[str, Any]]
    inputs: dict[str, str]
    facts: dict[str, Any]
    format: int = FORMAT

    @property
    def fingerprint(self) -> str:
        """A hash of kind, files and inputs; the same for every attempt that made the same content."""
        content = {"kind": self.kind, "files": self.files, "inputs": self.inputs}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


@dataclass
class Attempt:
    """An artefact in the making; what it writes is not believed until it is committed."""

    root: Folder
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)

    @contextmanager
    def open(self, name: str) -> Iterator[HashingWriter]:
        """A file of the artefact to write, hashed as it is written."""
        with self.root.open(name, "wb") as file, hash_while_writing(file) as target:
            yield target
        self.files[name] = {"size": target.size, "sha256": target.digest.hexdigest()}

    def write(self, name: str, data: bytes) -> None:
        """A whole file of the artefact."""
        with self.open(name) as file:
            file.write(data)

    def link_files(self, artefact: Output) -> None:
        """Every file of a committed artefact, as it is."""
        for name, facts in artefact.manifest.files.items():
            self.root.take(artefact.files(), name)
            self.files[name] = facts

    def check_files(self) -> None:
        """Looks whether all that was written is there.

        Raises:
            StorageError: a file is missing or of another size; somebody removed it, or the store lost it.
        """
        found = self.root.sizes()
        for name, written in self.files.items():
            if found.get(name) != written["size"]:
                raise StorageError(
                    f"{self.root.url_of(name)} is gone or cut short before it was committed (does `secateur gc` run at the "
                    f"same time?); run the same command again"
                )


class Output:
    """A folder that is believed once it holds a manifest, and never changes after."""

    def __init__(self, root: Folder) -> None:
        self.root = root
        self._manifest: Manifest | None = None

    @property
    def committed(self) -> bool:
        """Whether it exists."""
        return self._manifest is not None or self.root.exists(MANIFEST_FILE)

    @property
    def manifest(self) -> Manifest:
        """Its manifest.

        Raises:
            StorageError: it is not committed, or its manifest is damaged.
        """
        if self._manifest is None:
            if not self.committed:
                raise StorageError(
                    f"{self.root.url} is not there yet; the step that makes it has not finished"
                )
            self._manifest = _parse(
                self.root.read_bytes(MANIFEST_FILE), self.root.url_of(MANIFEST_FILE)
            )
        return self._manifest

    @property
    def fingerprint(self) -> str:
        """See `Manifest.fingerprint`."""
        return self.manifest.fingerprint

    def names(self) -> list[str]:
        """Its files."""
        return sorted(self.manifest.files)

    def read(self, name: str) -> bytes:
        """A whole file.

        Raises:
            StorageError: it isn't what was committed.
        """
        size, sha256 = self._promised(name)
        data = self.files().read_bytes(name)
        if (len(data), hashlib.sha256(data).hexdigest()) != (size, sha256):
            raise StorageError(f"{self.url(name)} is damaged; restore it or run that step again")
        return data

    @contextmanager
    def local(self, name: str) -> Iterator[Path]:
        """A local file with the content, to be mapped into memory within the block: itself, or a cached copy.

        Raises:
            StorageError: it isn't what was committed.
        """
        size, sha256 = self._promised(name)
        files = self.files()
        try:
            if files.is_local:
                with wrap_io_errors(self.url(name), "read"):
                    check_file(files.path(name), size, sha256)
                yield files.path(name)
                return
            with FileCache().holding(size, sha256, lambda path: files.fetch(name, path)) as path:
                yield path
        except ContentMismatch as error:
            raise StorageError(
                f"{self.url(name)} is damaged; restore it or run that step again"
            ) from error

    def url(self, name: str) -> str:
        """Path or URL of a file."""
        return self.files().url_of(self._known(name))

    def remove(self) -> None:
        """Removes an artefact that served its purpose, its manifest first, and nothing that another attempt is writing."""
        if not self.committed:
            return
        files = self.files()
        self._manifest = None
        self.root.remove(MANIFEST_FILE)
        files.delete()

    @contextmanager
    def attempt(self, kind: str, inputs: dict[str, str]) -> Iterator[Attempt]:
        """Makes the artefact: write its files within the block, and it is committed at the block's end.

        Where another attempt commits first, that one stands and this one's files are removed; they are removed too
        when the block raises.
        """
        name = uuid.uuid4().hex[:12]
        attempt = Attempt(self.root.child(name))
        try:
            yield attempt
            attempt.check_files()
            attempt.root.settle(attempt.files)
            manifest = Manifest(kind, name, attempt.files, inputs, attempt.facts)
            text = _sealed(asdict(manifest))
        except BaseException:
            with suppress(Exception):
                attempt.root.delete()
            raise
        self._commit(attempt, name, text.encode())

    def _commit(self, attempt: Attempt, name: str, text: bytes) -> None:
        """Writes the manifest, unless one is there. A store may take it though its answer is lost, and a second try then
        finds it: files are removed only where the manifest surely isn't this attempt's."""
        try:
            self.root.create(MANIFEST_FILE, text)
        except FileExistsError:
            if self.manifest.attempt != name:
                attempt.root.delete()
        except BaseException:
            with suppress(Exception):
                if self.root.is_local and not self.root.exists(MANIFEST_FILE):
                    attempt.root.delete()
            raise

    def files(self) -> Folder:
        """The folder that its files are in."""
        return self.root.child(self.manifest.attempt)

    def _promised(self, name: str) -> tuple[int, str]:
        promised = self.manifest.files[self._known(name)]
        return promised["size"], promised["sha256"]

    def _known(self, name: str) -> str:
        if name not in self.manifest.files:
            raise StorageError(
                f"{self.root.url} holds no {name}; it holds {', '.join(self.names()) or 'no files'}"
            )
        return name


def _sealed(values: dict[str, Any]) -> str:
    """A manifest's file: its values, and their hash."""
    return (
        json.dumps(values | {"seal": _seal(values)}, sort_keys=True, indent=1, allow_nan=False)
        + "\n"
    )


def _seal(values: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _parse(data: bytes, where: str) -> Manifest:
    """A manifest from its file.

    Raises:
        StorageError: it is damaged or of another format.
    """
    try:
        values = json.loads(data)
        if values.pop("seal", None) != _seal(values):
            raise ValueError("its content is not what its seal says")
        manifest = Manifest(**values)
        whole = (
            ATTEMPT.fullmatch(manifest.attempt)
            and all("\0" not in name and not {"", ".", ".."} & set(name.split("/")) for name in manifest.files)
            and all(isinstance(f["size"], int) and SHA256.fullmatch(f["sha256"]) for f in manifest.files.values())
            and isinstance(manifest.inputs, dict) and isinstance(manifest.facts, dict)
        )  # fmt: skip
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise StorageError(
            f"{where} is damaged ({error}); remove its folder and run again"
        ) from error
    if not whole or manifest.format != FORMAT:
        raise StorageError(
            f"{where} is not of format {FORMAT}, or names files outside its folder; remove its folder"
        )
    return manifest


def list_outputs(root: Folder) -> list[Output]:
    """Every artefact below a folder that has a manifest, damaged or not."""
    names = [name for name in root.files() if name.rsplit("/", 1)[-1] == MANIFEST_FILE]
    return [Output(root.child(*name.split("/")[:-1])) for name in names]


def copy_output(source: Output, target: Output) -> None:
    """Makes an artefact of the same content, inputs and facts, and so of the same fingerprint, unless it is there."""
    if target.committed:
        return
    with target.attempt(source.manifest.kind, source.manifest.inputs) as attempt:
        attempt.link_files(source)
        attempt.facts.update(source.manifest.facts)


def copy_outputs(source: Folder, target: Folder, without: Collection[str] = ()) -> None:
    """Copies every artefact below a folder, but for those below the folders named in `without`."""
    for artefact in list_outputs(source):
        place = artefact.root.url.removeprefix(source.url).strip("/").split("/")
        if place[0] not in without:
            copy_output(artefact, Output(target.child(*place)))

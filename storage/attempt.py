"""An attempt to write an output: its files, which do not count until they are committed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from secateur.errors import StorageError
from secateur.storage.folder import Folder
from secateur.storage.hashing_writer import HashingWriter, hash_while_writing

if TYPE_CHECKING:
    from secateur.storage.outputs import Output

REMOVED = ".removed"  # ends the name of the mark of a file that was removed on purpose


@dataclass
class Attempt:
    """Files that one process writes for an output. They do not count until they are committed.

    Attributes:
        root: the folder to write the files to.
        files: `size` (bytes) and `sha256` of each written file, by name.
        facts: small figures about the content, for the manifest.
        removed: those of the files that were removed from the output they are linked from.
    """

    root: Folder
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    removed: set[str] = field(default_factory=set)

    @contextmanager
    def open(self, name: str) -> Iterator[HashingWriter]:
        """Open a file of the output for writing. It is hashed while it is written."""
        with self.root.open(name, "wb") as file, hash_while_writing(file) as writer:
            yield writer
        self.files[name] = {"size": writer.size, "sha256": writer.digest.hexdigest()}

    def write(self, name: str, data: bytes) -> None:
        """Write a whole file of the output."""
        with self.open(name) as file:
            file.write(data)

    def link_files(self, output: Output) -> None:
        """Add every file of a committed output, without reading it.

        Of a file that was removed from there on purpose, the mark is added.
        """
        for name, entry in output.manifest.files.items():
            if output.is_removed(name):
                self.root.create(f"{name}{REMOVED}", b"")
                self.removed.add(name)
            else:
                self.root.link_or_copy(output.files(), name)
            self.files[name] = entry

    def check_files(self) -> None:
        """Check that every written file exists with its size.

        Raises:
            StorageError: a file is missing or has another size, because it was removed meanwhile
                or because the store lost it.
        """
        sizes = self.root.sizes()
        for name, entry in self.files.items():
            if name not in self.removed and sizes.get(name) != entry["size"]:
                raise StorageError(
                    f"{self.root.url_of(name)} is missing or was truncated before it was committed "
                    f"(does `secateur gc` run at the same time?); run the same command again"
                )

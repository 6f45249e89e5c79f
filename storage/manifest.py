"""Manifests: files that list and seal the content of outputs, and so make them count as written."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass
from typing import Any

from secateur.errors import StorageError

FORMAT = 1
MANIFEST_FILE = "manifest.json"
ATTEMPT = re.compile("[0-9a-f]{12}")
SHA256 = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True)
class Manifest:
    """The content of an output.

    Attributes:
        kind: the sort of output, such as `samples` or `ledger`.
        attempt: the folder that holds the files, within the output's folder.
        files: `size` (bytes) and `sha256` of each file, by name.
        inputs: fingerprints of the outputs that this one was computed from.
        facts: small figures about the content.
        format: the version of the manifest's own format.
    """

    kind: str
    attempt: str
    files: dict[str, dict[str, Any]]
    inputs: dict[str, str]
    facts: dict[str, Any]
    format: int = FORMAT

    @property
    def fingerprint(self) -> str:
        """The hash of kind, files and inputs. Attempts that wrote the same content share it."""
        content = {"kind": self.kind, "files": self.files, "inputs": self.inputs}
        return _hash_json(content)


def serialize_manifest(manifest: Manifest) -> bytes:
    """Return the bytes of a manifest's file: its values, and their hash as `seal`."""
    values = asdict(manifest)
    sealed = values | {"seal": _hash_json(values)}
    # A NaN would be written as a word that is not JSON.
    text = json.dumps(sealed, sort_keys=True, indent=1, allow_nan=False)
    return f"{text}\n".encode()


def parse_manifest(data: bytes, url: str) -> Manifest:
    """Return the manifest that a file holds.

    Args:
        data: the file's bytes.
        url: the file's path or URL, for messages.

    Raises:
        StorageError: the file is damaged, has another format, or names files outside its folder.
    """
    try:
        values = json.loads(data)
        if values.pop("seal", None) != _hash_json(values):
            raise ValueError("its content does not match its seal")
        manifest = Manifest(**values)
        valid = _is_valid(manifest)
    # Deeply nested JSON raises RecursionError. JSON of another shape raises the other errors.
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise StorageError(
            f"{url} is damaged ({error}); remove its folder and run again"
        ) from error
    if not valid:
        raise StorageError(
            f"{url} is not of format {FORMAT}, or names files outside its folder; remove its folder"
        )
    return manifest


def _is_valid(manifest: Manifest) -> bool:
    """Check format and types. The seal protects against damage, but anyone can compute a seal."""
    return bool(
        manifest.format == FORMAT
        and ATTEMPT.fullmatch(manifest.attempt)
        and all(_is_relative_name(name) for name in manifest.files)
        and all(_is_file_entry(entry) for entry in manifest.files.values())
        and isinstance(manifest.inputs, dict)
        and isinstance(manifest.facts, dict)
    )


def _is_relative_name(name: str) -> bool:
    """Check that a file name stays within its folder."""
    return "\0" not in name and not {"", ".", ".."} & set(name.split("/"))


def _is_file_entry(entry: dict[str, Any]) -> bool:
    return isinstance(entry["size"], int) and SHA256.fullmatch(entry["sha256"]) is not None


def _hash_json(values: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()

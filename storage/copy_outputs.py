"""Copies of committed outputs in another folder."""

from __future__ import annotations

from collections.abc import Collection

from secateur.storage.attempt import Attempt
from secateur.storage.folder import Folder
from secateur.storage.outputs import Output, list_outputs


def copy_output(source: Output, target: Output) -> None:
    """Copy an output with its inputs and facts, and so its fingerprint, unless it exists."""

    def link(attempt: Attempt) -> None:
        attempt.link_files(source)
        attempt.facts.update(source.manifest.facts)

    target.write_once(source.manifest.kind, source.manifest.inputs, link)


def copy_outputs(source: Folder, target: Folder, without: Collection[str] = ()) -> None:
    """Copy every output below a folder, except those below the folders named in `without`."""
    for output in list_outputs(source):
        parts = output.root.url.removeprefix(source.url).strip("/").split("/")
        if parts[0] not in without:
            copy_output(output, Output(target.child(*parts)))

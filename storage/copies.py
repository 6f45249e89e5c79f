"""Room `storage`: committed artefacts made again in another folder of the same disk or store, without their bytes passing."""

from __future__ import annotations

from collections.abc import Collection

from storage.integrity import artefacts
from storage.manifest import Artefact
from storage.root import Root


def copy_artefact(source: Artefact, target: Artefact) -> None:
    """Makes an artefact of the same content, inputs and facts, and so of the same fingerprint, unless it is there."""
    if target.committed:
        return
    with target.attempt(source.manifest.kind, source.manifest.inputs) as attempt:
        attempt.adopt(source)
        attempt.facts.update(source.manifest.facts)


def copy_artefacts(source: Root, target: Root, without: Collection[str] = ()) -> None:
    """Copies every artefact below a folder, but for those below the folders named in `without`."""
    for artefact in artefacts(source):
        place = artefact.root.url.removeprefix(source.url).strip("/").split("/")
        if place[0] not in without:
            copy_artefact(artefact, Artefact(target.child(*place)))

"""What is missing, changed or extra is named, on disk and on two S3 servers; what is collected is what no manifest names."""

from __future__ import annotations

import pytest

from storage.integrity import Finding, stray, verify
from storage.manifest import Artefact
from storage.root import Root


@pytest.fixture
def root(base: str) -> Root:
    root = Root(f"{base}/run")
    for name in ("one", "deep/two"):
        with Artefact(root.child(*name.split("/"))).attempt("test", {}) as attempt:
            attempt.write("a", b"x" * 1000)
            attempt.write("b/c", b"y" * 10)
    return root


def files(root: Root, name: str) -> dict[str, str]:
    """The artefact's files by name, as names within the root."""
    artefact = Artefact(root.child(*name.split("/")))
    return {n: f"{name}/{artefact.manifest.attempt}/{n}" for n in artefact.names()}


def write(root: Root, name: str, data: bytes) -> None:
    with root.open(name, "wb") as file:
        file.write(data)


def test_a_whole_folder_has_no_findings(root: Root) -> None:
    assert list(verify(root)) == []
    assert stray(root) == []


def test_every_kind_of_damage_is_named(root: Root) -> None:
    one, two = files(root, "one"), files(root, "deep/two")
    write(root, one["a"], b"x" * 999 + b"z")  # a flip that keeps the size
    write(root, one["b/c"], b"y" * 9)
    root.remove(two["a"])
    write(root, "deep/two/never-committed/a", b"half")
    assert sorted(verify(root), key=lambda f: f.file) == sorted(
        [
            Finding("changed", one["a"]),
            Finding("changed", one["b/c"]),
            Finding("missing", two["a"]),
            Finding("extra", "deep/two/never-committed/a"),
        ],
        key=lambda f: f.file,
    )
    assert stray(root) == ["deep/two/never-committed/a"]


def test_nothing_near_a_damaged_manifest_is_collected(root: Root) -> None:
    write(root, "one/manifest.json", b"{")
    assert list(verify(root)) == [Finding("damaged", "one/manifest.json")]
    assert stray(root) == []

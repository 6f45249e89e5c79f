"""What is missing, changed or extra is named, on disk and on two S3 servers; what is collected is what no manifest names."""

from __future__ import annotations

from pathlib import Path

import pytest

from storage.errors import StorageError
from storage.integrity import Finding, collect, stray, verify
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


def test_what_is_committed_while_strays_are_sought_is_none(root: Root, monkeypatch: pytest.MonkeyPatch) -> None:
    """An artefact that got its manifest after the manifests were listed, but before the files were, would be lost."""
    listed = Root.files

    def and_commit(folder: Root) -> list[str]:
        found = listed(folder)
        late = Artefact(root.child("late"))
        if not late.committed:
            with late.attempt("test", {}) as attempt:
                attempt.write("a", b"x")
        return found

    monkeypatch.setattr(Root, "files", and_commit)
    assert stray(root) == []


def test_an_attempt_whose_files_are_collected_ends_with_an_error(root: Root) -> None:
    artefact = Artefact(root.child("late"))
    with pytest.raises(StorageError, match=r"gone or cut short .*secateur gc"), artefact.attempt("test", {}) as attempt:  # noqa: PT012
        attempt.write("a", b"x")
        assert len(collect(root)) == 1
    assert list(verify(root)) == []


def test_an_attempt_that_commits_as_its_files_are_collected_is_taken_back(
    root: Root, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the last look at its files and its manifest."""
    late = root.child("late")
    with Artefact(late).attempt("test", {}) as attempt:
        attempt.write("a", b"x")
    manifest = late.read_bytes("manifest.json")
    late.remove("manifest.json")
    remove = Root.remove

    def and_commit(folder: Root, name: str) -> None:
        remove(folder, name)
        if name.endswith("/a"):
            late.create("manifest.json", manifest)

    monkeypatch.setattr(Root, "remove", and_commit)
    assert len(collect(root)) == 1
    assert not Artefact(late).committed
    assert list(verify(root)) == []


def test_nothing_outside_a_run_is_touched_through_links(tmp_path: Path) -> None:
    """Links that lead out of the folder are collected as what they are; what they lead to stays."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").write_bytes(b"x")
    root = Root(str(tmp_path / "run"))
    with Artefact(root.child("one")).attempt("test", {}) as attempt:
        attempt.write("a", b"x")
    (tmp_path / "run/one/folder").symlink_to(outside)
    (tmp_path / "run/one/file").symlink_to(outside / "precious")
    assert collect(root) == ["one/file", "one/folder"]
    assert list(verify(root)) == []
    Artefact(root.child("one")).remove()
    assert (outside / "precious").read_bytes() == b"x"

"""What is missing, changed or extra is named, on disk and on two S3 servers; what is collected is what no manifest names."""

from __future__ import annotations

from pathlib import Path

import pytest

from secateur.errors import StorageError
from secateur.storage.folder import Folder
from secateur.storage.integrity import Finding, find_stray_files, remove_stray_files, verify_folder
from secateur.storage.outputs import Output


@pytest.fixture
def root(base: str) -> Folder:
    root = Folder(f"{base}/run")
    for name in ("one", "deep/two"):
        with Output(root.child(*name.split("/"))).attempt("test", {}) as attempt:
            attempt.write("a", b"x" * 1000)
            attempt.write("b/c", b"y" * 10)
    return root


def files(root: Folder, name: str) -> dict[str, str]:
    """The artefact's files by name, as names within the root."""
    artefact = Output(root.child(*name.split("/")))
    return {n: f"{name}/{artefact.manifest.attempt}/{n}" for n in artefact.names()}


def write(root: Folder, name: str, data: bytes) -> None:
    with root.open(name, "wb") as file:
        file.write(data)


def test_a_whole_folder_has_no_findings(root: Folder) -> None:
    assert list(verify_folder(root)) == []
    assert find_stray_files(root) == []


def test_every_kind_of_damage_is_named(root: Folder) -> None:
    one, two = files(root, "one"), files(root, "deep/two")
    write(root, one["a"], b"x" * 999 + b"z")  # a flip that keeps the size
    write(root, one["b/c"], b"y" * 9)
    root.remove(two["a"])
    write(root, "deep/two/never-committed/a", b"half")
    assert sorted(verify_folder(root), key=lambda f: f.file) == sorted(
        [
            Finding("changed", one["a"]),
            Finding("changed", one["b/c"]),
            Finding("missing", two["a"]),
            Finding("extra", "deep/two/never-committed/a"),
        ],
        key=lambda f: f.file,
    )
    assert find_stray_files(root) == ["deep/two/never-committed/a"]


def test_nothing_near_a_damaged_manifest_is_collected(root: Folder) -> None:
    write(root, "one/manifest.json", b"{")
    assert list(verify_folder(root)) == [Finding("damaged", "one/manifest.json")]
    assert find_stray_files(root) == []


def test_what_is_committed_while_strays_are_sought_is_none(
    root: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An artefact that got its manifest after the manifests were listed, but before the files were, would be lost."""
    listed = Folder.files

    def and_commit(folder: Folder) -> list[str]:
        found = listed(folder)
        late = Output(root.child("late"))
        if not late.committed:
            with late.attempt("test", {}) as attempt:
                attempt.write("a", b"x")
        return found

    monkeypatch.setattr(Folder, "files", and_commit)
    assert find_stray_files(root) == []


def test_an_attempt_whose_files_are_collected_ends_with_an_error(root: Folder) -> None:
    artefact = Output(root.child("late"))
    with (
        pytest.raises(StorageError, match=r"gone or cut short .*secateur gc"),
        artefact.attempt("test", {}) as attempt,
    ):
        attempt.write("a", b"x")
        assert len(remove_stray_files(root)) == 1
    assert list(verify_folder(root)) == []


def test_an_attempt_that_commits_as_its_files_are_collected_is_taken_back(
    root: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the last look at its files and its manifest."""
    late = root.child("late")
    with Output(late).attempt("test", {}) as attempt:
        attempt.write("a", b"x")
    manifest = late.read_bytes("manifest.json")
    late.remove("manifest.json")
    remove = Folder.remove

    def and_commit(folder: Folder, name: str) -> None:
        remove(folder, name)
        if name.endswith("/a"):
            late.create("manifest.json", manifest)

    monkeypatch.setattr(Folder, "remove", and_commit)
    assert len(remove_stray_files(root)) == 1
    assert not Output(late).committed
    assert list(verify_folder(root)) == []


def test_nothing_outside_a_run_is_touched_through_links(tmp_path: Path) -> None:
    """Links that lead out of the folder are collected as what they are; what they lead to stays."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").write_bytes(b"x")
    root = Folder(str(tmp_path / "run"))
    with Output(root.child("one")).attempt("test", {}) as attempt:
        attempt.write("a", b"x")
    (tmp_path / "run/one/folder").symlink_to(outside)
    (tmp_path / "run/one/file").symlink_to(outside / "precious")
    assert remove_stray_files(root) == ["one/file", "one/folder"]
    assert list(verify_folder(root)) == []
    Output(root.child("one")).remove()
    assert (outside / "precious").read_bytes() == b"x"

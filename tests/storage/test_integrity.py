"""Tests of verification and garbage collection, on a local disk and two S3 servers."""

from __future__ import annotations

from pathlib import Path

import pytest

from secateur.errors import StorageError
from secateur.storage.attempt import Attempt
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
    """Return the files of an output by name, as names within the root."""
    output = Output(root.child(*name.split("/")))
    return {n: f"{name}/{output.manifest.attempt}/{n}" for n in output.names()}


def write(root: Folder, name: str, data: bytes) -> None:
    with root.open(name, "wb") as file:
        file.write(data)


def test_intact_folder_has_no_findings(root: Folder) -> None:
    assert list(verify_folder(root)) == []
    assert find_stray_files(root) == []


def test_every_kind_of_damage_is_named(root: Folder) -> None:
    one, two = files(root, "one"), files(root, "deep/two")
    write(root, one["a"], b"x" * 999 + b"z")  # a changed byte that keeps the size
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


def test_a_file_that_was_removed_on_purpose_is_no_damage(
    root: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A removal that was interrupted after its mark changes nothing, and the next one ends it."""
    one = files(root, "one")
    with monkeypatch.context() as patched:
        patched.setattr(Folder, "remove", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            Output(root.child("one")).remove_file("b/c")
    assert root.exists(one["b/c"])
    assert (list(verify_folder(root)), remove_stray_files(root)) == ([], [])
    for _ in range(2):
        Output(root.child("one")).remove_file("b/c")
        assert not root.exists(one["b/c"])
        assert (list(verify_folder(root)), remove_stray_files(root)) == ([], [])
    output = Output(root.child("one"))
    assert output.is_removed("b/c")
    assert not output.is_removed("a")
    assert output.read("a") == b"x" * 1000
    with pytest.raises(StorageError, match="holds no d"):
        output.remove_file("d")
    output.remove()
    assert [name for name in root.files() if name.startswith("one/")] == []


def test_files_of_a_damaged_manifest_are_not_stray(root: Folder) -> None:
    write(root, "one/manifest.json", b"{")
    assert list(verify_folder(root)) == [Finding("damaged", "one/manifest.json")]
    assert find_stray_files(root) == []


def test_output_committed_during_the_search_is_not_stray(
    root: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If manifests were listed before files, an output committed in between would be lost."""
    list_files = Folder.files

    def list_and_commit(folder: Folder) -> list[str]:
        names = list_files(folder)
        late = Output(root.child("late"))
        if not late.committed:
            with late.attempt("test", {}) as attempt:
                attempt.write("a", b"x")
        return names

    monkeypatch.setattr(Folder, "files", list_and_commit)
    assert find_stray_files(root) == []


def test_attempt_whose_files_are_removed_ends_with_an_error(root: Folder) -> None:
    def write_and_remove(attempt: Attempt) -> None:
        attempt.write("a", b"x")
        assert len(remove_stray_files(root)) == 1

    output = Output(root.child("late"))
    with pytest.raises(StorageError, match=r"missing or was truncated .*secateur gc"):
        output.write_once("test", {}, write_and_remove)
    assert list(verify_folder(root)) == []


def test_manifest_of_removed_files_is_removed_too(
    root: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The files are removed between the last check of them and the manifest."""
    late = root.child("late")
    with Output(late).attempt("test", {}) as attempt:
        attempt.write("a", b"x")
    manifest = late.read_bytes("manifest.json")
    late.remove("manifest.json")
    remove = Folder.remove

    def remove_and_commit(folder: Folder, name: str) -> None:
        remove(folder, name)
        if name.endswith("/a"):
            late.create("manifest.json", manifest)

    monkeypatch.setattr(Folder, "remove", remove_and_commit)
    assert len(remove_stray_files(root)) == 1
    assert not Output(late).committed
    assert list(verify_folder(root)) == []


def test_links_out_of_a_run_are_not_followed(tmp_path: Path) -> None:
    """Links that point outside the folder are removed, but not the files that they point to."""
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

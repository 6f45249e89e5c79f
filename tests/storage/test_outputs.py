"""The commit protocol: nothing exists before its manifest, and of two attempts one wins."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from secateur.errors import StorageError
from secateur.storage.folder import Folder
from secateur.storage.outputs import Output

WHOLE = {"size": 1, "sha256": "0" * 64}
RACER = """
import pathlib, sys, time
from secateur.storage.outputs import Output
from secateur.storage.folder import Folder
base, name, meeting, turns = sys.argv[1:]
for number in range(int(turns)):
    (pathlib.Path(meeting) / f"{number}-{name}").write_text("")
    while len(list(pathlib.Path(meeting).glob(f"{number}-*"))) < 2:
        time.sleep(0.0005)
    artefact = Output(Folder(f"{base}/a{number}"))
    with artefact.attempt("race", {}) as attempt:
        attempt.write("who", name.encode() * 2000)
    print(artefact.read("who")[:1].decode(), end="")
"""


def commit(root: Path, **files: bytes) -> Output:
    artefact = Output(Folder(str(root)))
    with artefact.attempt("test", {"from": "x"}) as attempt:
        for name, data in files.items():
            attempt.write(name, data)
        attempt.facts["count"] = len(files)
    return artefact


def test_an_artefact_is_there_once_its_block_ends(tmp_path: Path) -> None:
    artefact = Output(Folder(str(tmp_path)))
    with artefact.attempt("test", {}) as attempt:
        attempt.write("a", b"one")
        assert not Output(Folder(str(tmp_path))).committed
    again = Output(Folder(str(tmp_path)))
    assert again.read("a") == b"one"
    assert again.manifest.files["a"]["size"] == 3


def test_a_failing_attempt_leaves_no_file(tmp_path: Path) -> None:
    artefact = Output(Folder(str(tmp_path)))

    def fail() -> None:
        with artefact.attempt("test", {}) as attempt:
            attempt.write("a", b"one")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert artefact.root.files() == []


def test_the_later_attempt_yields_and_cleans_up(tmp_path: Path) -> None:
    late = Output(Folder(str(tmp_path)))
    with late.attempt("test", {}) as attempt:
        attempt.write("a", b"late")
        commit(tmp_path, a=b"first")
    assert late.read("a") == b"first"
    assert len(late.root.files()) == 2  # the first attempt's file and the manifest


@pytest.mark.parametrize("turns", [8, pytest.param(100, marks=pytest.mark.slow)])
def test_of_two_processes_exactly_one_wins_each_time(base: str, tmp_path: Path, turns: int) -> None:
    seen = race(base, tmp_path, turns)
    assert seen[0] == seen[1]
    assert len(seen[0]) == turns
    assert all(len(Folder(f"{base}/a{n}").files()) == 2 for n in range(turns))


def race(base: str, folder: Path, turns: int) -> list[str]:
    """What two processes that commit the same artefacts at the same moments read back: the winner's name, each time."""
    meeting = folder / "meeting"
    meeting.mkdir()
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", RACER, base, name, str(meeting), str(turns)],
            stdout=subprocess.PIPE,
            text=True,
        )
        for name in "xy"
    ]
    seen = [racer.communicate()[0] for racer in racers]
    assert [racer.returncode for racer in racers] == [0, 0]
    return seen


def test_fingerprints_follow_content_not_attempts(tmp_path: Path) -> None:
    one, same, other = (
        commit(tmp_path / n, a=d) for n, d in (("1", b"x"), ("2", b"x"), ("3", b"y"))
    )
    assert one.fingerprint == same.fingerprint != other.fingerprint


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[:40],
        lambda text: b"[]",
        lambda text: text.replace(b'"format": 1', b'"format": 9'),
        lambda text: text.replace(b'"a"', b'"../../a"'),
        lambda text: b"\xff\xfe" + text,
        lambda text: text.replace(b'"count": 1', b'"count": 2'),
    ],
)
def test_a_damaged_manifest_is_one_sentence(tmp_path: Path, damage) -> None:  # type: ignore[no-untyped-def]
    commit(tmp_path, a=b"x")
    manifest = tmp_path / "manifest.json"
    manifest.write_bytes(damage(manifest.read_bytes()))
    with pytest.raises(StorageError, match=r"manifest\.json"):
        Output(Folder(str(tmp_path))).read("a")


def test_manifests_are_readable(tmp_path: Path) -> None:
    commit(tmp_path, a=b"x")
    found = json.loads((tmp_path / "manifest.json").read_text())
    assert (found["kind"], found["facts"], found["inputs"]) == ("test", {"count": 1}, {"from": "x"})


@pytest.mark.parametrize(
    "values",
    [
        {"files": {"../../a": {}}}, {"files": {"a\0": WHOLE}}, {"files": {"a//b": WHOLE}}, {"files": {"a": {}}},
        {"files": {"a": WHOLE | {"sha256": "../../a"}}}, {"attempt": "/etc"}, {"attempt": ".."}, {"attempt": 5},
        {"format": 9}, {"facts": []},
    ],
)  # fmt: skip
def test_a_manifest_that_is_sealed_but_not_ours_is_one_sentence(
    tmp_path: Path, values: dict[str, Any]
) -> None:
    """Whoever can write manifests can seal them: what they name is still held within the folder."""
    commit(tmp_path, a=b"x")
    manifest = tmp_path / "manifest.json"
    found = json.loads(manifest.read_text()) | values
    del found["seal"]
    sealed = found | {
        "seal": hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()
    }
    manifest.write_text(json.dumps(sealed))
    with pytest.raises(StorageError, match=r"manifest\.json"):
        Output(Folder(str(tmp_path))).read("a")


def test_removing_an_artefact_spares_what_another_attempt_is_writing(base: str) -> None:
    """The other would commit a manifest whose files are gone."""
    artefact = Output(Folder(f"{base}/a"))
    with artefact.attempt("test", {}) as first:
        first.write("a", b"first")
    removed = Output(artefact.root)
    assert removed.committed
    late = Output(artefact.root)
    with late.attempt("test", {}) as attempt:
        attempt.write("a", b"late")
        removed.remove()
        removed.remove()  # twice is once
        assert not Output(artefact.root).committed
    assert Output(artefact.root).read("a") == b"late"
    assert len(artefact.root.files()) == 2


def test_a_file_that_the_store_cut_short_is_not_committed(base: str) -> None:
    artefact = Output(Folder(f"{base}/a"))
    with (
        pytest.raises(StorageError, match=r"b is gone or cut short"),
        artefact.attempt("test", {}) as attempt,
    ):
        attempt.write("a", b"one")
        attempt.write("b", b"two")
        with attempt.root.open("b", "wb") as file:
            file.write(b"tw")
    assert artefact.root.files() == []


def test_files_and_the_folders_that_name_them_are_on_the_disk_before_and_after_the_manifest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A power cut may otherwise take the names of files from a folder whose manifest promises them."""
    synced: list[tuple[str, bool]] = []
    sync = os.fsync

    def noted(handle: int) -> None:
        sync(handle)
        place = os.readlink(f"/proc/self/fd/{handle}").removeprefix(str(tmp_path)).lstrip("/")
        synced.append((place, (tmp_path / "run/a/manifest.json").exists()))

    monkeypatch.setattr(os, "fsync", noted)
    artefact = commit(tmp_path / "run/a", **{"deep/b": b"x"})
    attempt = artefact.manifest.attempt
    before = {place for place, committed in synced if not committed}
    assert {
        f"run/a/{attempt}/deep/b",
        f"run/a/{attempt}/deep",
        f"run/a/{attempt}",
        "run/a",
        "run",
        "",
    } <= before
    assert [place for place, committed in synced if committed] == ["run/a"]

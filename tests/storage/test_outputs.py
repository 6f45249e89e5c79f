"""Tests of the commit protocol: an output exists from its manifest on, and one attempt wins."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from secateur.errors import StorageError
from secateur.storage.attempt import Attempt
from secateur.storage.folder import Folder
from secateur.storage.outputs import Output

ENTRY = {"size": 1, "sha256": "0" * 64}
RACER = """
import pathlib, sys, time
from secateur.storage.attempt import Attempt
from secateur.storage.outputs import Output
from secateur.storage.folder import Folder
base, name, meeting, turns = sys.argv[1:]
for number in range(int(turns)):
    (pathlib.Path(meeting) / f"{number}-{name}").write_text("")
    while len(list(pathlib.Path(meeting).glob(f"{number}-*"))) < 2:
        time.sleep(0.0005)
    output = Output(Folder(f"{base}/a{number}"))
    with output.attempt("race", {}) as attempt:
        attempt.write("who", name.encode() * 2000)
    print(output.read("who")[:1].decode(), end="")
"""


def commit(root: Path, **files: bytes) -> Output:
    output = Output(Folder(str(root)))
    with output.attempt("test", {"from": "x"}) as attempt:
        for name, data in files.items():
            attempt.write(name, data)
        attempt.facts["count"] = len(files)
    return output


def test_output_is_committed_at_the_end_of_its_block(tmp_path: Path) -> None:
    output = Output(Folder(str(tmp_path)))
    with output.attempt("test", {}) as attempt:
        attempt.write("a", b"one")
        assert not Output(Folder(str(tmp_path))).committed
    again = Output(Folder(str(tmp_path)))
    assert again.read("a") == b"one"
    assert again.manifest.files["a"]["size"] == 3


def test_write_once_writes_only_once(tmp_path: Path) -> None:
    output = Output(Folder(str(tmp_path)))
    calls: list[str] = []

    def write(attempt: Attempt) -> None:
        calls.append("write")
        attempt.write("a", b"one")
        attempt.facts["count"] = 1

    first = output.write_once("test", {"from": "x"}, write)
    second = Output(output.root).write_once("test", {"from": "x"}, write)
    assert first == second == output.manifest
    assert (first.kind, first.inputs, first.facts) == ("test", {"from": "x"}, {"count": 1})
    assert calls == ["write"]


def test_write_once_returns_the_manifest_of_the_attempt_that_won(tmp_path: Path) -> None:
    def write(attempt: Attempt) -> None:
        attempt.write("a", b"late")
        commit(tmp_path, a=b"first")

    output = Output(Folder(str(tmp_path)))
    manifest = output.write_once("test", {}, write)
    assert manifest.inputs == {"from": "x"}
    assert output.read("a") == b"first"


def test_failed_attempt_leaves_no_file(tmp_path: Path) -> None:
    output = Output(Folder(str(tmp_path)))

    def fail() -> None:
        with output.attempt("test", {}) as attempt:
            attempt.write("a", b"one")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert output.root.files() == []


def test_later_attempt_is_discarded(tmp_path: Path) -> None:
    late = Output(Folder(str(tmp_path)))
    with late.attempt("test", {}) as attempt:
        attempt.write("a", b"late")
        commit(tmp_path, a=b"first")
    assert late.read("a") == b"first"
    assert len(late.root.files()) == 2  # the first attempt's file and the manifest


@pytest.mark.parametrize("turns", [8, pytest.param(100, marks=pytest.mark.slow)])
def test_exactly_one_of_two_processes_wins(base: str, tmp_path: Path, turns: int) -> None:
    seen = race(base, tmp_path, turns)
    assert seen[0] == seen[1]
    assert len(seen[0]) == turns
    assert all(len(Folder(f"{base}/a{n}").files()) == 2 for n in range(turns))


def race(base: str, folder: Path, turns: int) -> list[str]:
    """Let two processes commit the same outputs at the same moments.

    Returns:
        For each process, the name of the winner of each output, as the process read it.
    """
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


def test_fingerprint_depends_on_content_only(tmp_path: Path) -> None:
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
def test_damaged_manifest_is_an_error(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    commit(tmp_path, a=b"x")
    manifest = tmp_path / "manifest.json"
    manifest.write_bytes(damage(manifest.read_bytes()))
    with pytest.raises(StorageError, match=r"manifest\.json"):
        Output(Folder(str(tmp_path))).read("a")


def test_manifest_is_readable_json(tmp_path: Path) -> None:
    commit(tmp_path, a=b"x")
    written = json.loads((tmp_path / "manifest.json").read_text())
    assert (written["kind"], written["facts"], written["inputs"]) == (
        "test",
        {"count": 1},
        {"from": "x"},
    )


@pytest.mark.parametrize(
    "values",
    [
        {"files": {"../../a": {}}},
        {"files": {"a\0": ENTRY}},
        {"files": {"a//b": ENTRY}},
        {"files": {"a": {}}},
        {"files": {"a": ENTRY | {"sha256": "../../a"}}},
        {"attempt": "/etc"},
        {"attempt": ".."},
        {"attempt": 5},
        {"format": 9},
        {"facts": []},
    ],
)
def test_sealed_manifest_of_wrong_content_is_an_error(
    tmp_path: Path, values: dict[str, Any]
) -> None:
    """Anyone who can write a manifest can seal it, but its files must still be in its folder."""
    commit(tmp_path, a=b"x")
    manifest = tmp_path / "manifest.json"
    forged = json.loads(manifest.read_text()) | values
    del forged["seal"]
    forged |= {"seal": hashlib.sha256(json.dumps(forged, sort_keys=True).encode()).hexdigest()}
    manifest.write_text(json.dumps(forged))
    with pytest.raises(StorageError, match=r"manifest\.json"):
        Output(Folder(str(tmp_path))).read("a")


def test_remove_spares_files_of_another_attempt(base: str) -> None:
    """Otherwise the other attempt would commit a manifest whose files are missing."""
    output = Output(Folder(f"{base}/a"))
    with output.attempt("test", {}) as first:
        first.write("a", b"first")
    removed = Output(output.root)
    assert removed.committed
    late = Output(output.root)
    with late.attempt("test", {}) as attempt:
        attempt.write("a", b"late")
        removed.remove()
        removed.remove()  # a second call changes nothing
        assert not Output(output.root).committed
    assert Output(output.root).read("a") == b"late"
    assert len(output.root.files()) == 2


def test_truncated_file_is_not_committed(base: str) -> None:
    def write_and_truncate(attempt: Attempt) -> None:
        attempt.write("a", b"one")
        attempt.write("b", b"two")
        with attempt.root.open("b", "wb") as file:
            file.write(b"tw")

    output = Output(Folder(f"{base}/a"))
    with pytest.raises(StorageError, match=r"b is missing or was truncated"):
        output.write_once("test", {}, write_and_truncate)
    assert output.root.files() == []


def test_files_are_synced_before_the_manifest_and_its_folder_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise a power cut may remove files from a folder whose manifest lists them."""
    synced: list[tuple[str, bool]] = []
    fsync = os.fsync

    def record_fsync(handle: int) -> None:
        fsync(handle)
        place = os.readlink(f"/proc/self/fd/{handle}").removeprefix(str(tmp_path)).lstrip("/")
        synced.append((place, (tmp_path / "run/a/manifest.json").exists()))

    monkeypatch.setattr(os, "fsync", record_fsync)
    output = commit(tmp_path / "run/a", **{"deep/b": b"x"})
    attempt = output.manifest.attempt
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

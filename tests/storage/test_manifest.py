"""The commit protocol: nothing exists before its manifest, and of two attempts one wins."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from storage.errors import StorageError
from storage.manifest import Artefact
from storage.root import Root

TURNS = 100
RACER = f"""
import sys, pathlib
from storage.manifest import Artefact
from storage.root import Root
base, name, meeting = sys.argv[1:]
for number in range({TURNS}):
    (pathlib.Path(meeting) / f"{{number}}-{{name}}").write_text("")
    while len(list(pathlib.Path(meeting).glob(f"{{number}}-*"))) < 2:
        pass
    artefact = Artefact(Root(f"{{base}}/a{{number}}"))
    with artefact.attempt("race", {{}}) as attempt:
        attempt.write("who", name.encode() * 2000)
    print(artefact.read("who")[:1].decode(), end="")
"""


def commit(root: Path, **files: bytes) -> Artefact:
    artefact = Artefact(Root(str(root)))
    with artefact.attempt("test", {"from": "x"}) as attempt:
        for name, data in files.items():
            attempt.write(name, data)
        attempt.facts["count"] = len(files)
    return artefact


def test_an_artefact_is_there_once_its_block_ends(tmp_path: Path) -> None:
    artefact = Artefact(Root(str(tmp_path)))
    with artefact.attempt("test", {}) as attempt:
        attempt.write("a", b"one")
        assert not Artefact(Root(str(tmp_path))).committed
    again = Artefact(Root(str(tmp_path)))
    assert again.read("a") == b"one"
    assert again.manifest.files["a"]["size"] == 3


def test_a_failing_attempt_leaves_no_file(tmp_path: Path) -> None:
    artefact = Artefact(Root(str(tmp_path)))

    def fail() -> None:
        with artefact.attempt("test", {}) as attempt:
            attempt.write("a", b"one")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert artefact.root.files() == []


def test_the_later_attempt_yields_and_cleans_up(tmp_path: Path) -> None:
    late = Artefact(Root(str(tmp_path)))
    with late.attempt("test", {}) as attempt:
        attempt.write("a", b"late")
        commit(tmp_path, a=b"first")
    assert late.read("a") == b"first"
    assert len(late.root.files()) == 2  # the first attempt's file and the manifest


def test_of_two_processes_exactly_one_wins_each_time(base: str, tmp_path: Path) -> None:
    meeting = tmp_path / "meeting"
    meeting.mkdir()
    racers = [
        subprocess.Popen([sys.executable, "-c", RACER, base, name, str(meeting)], stdout=subprocess.PIPE, text=True)
        for name in "xy"
    ]
    seen = [racer.communicate()[0] for racer in racers]
    assert [racer.returncode for racer in racers] == [0, 0]
    assert seen[0] == seen[1]
    assert len(seen[0]) == TURNS
    assert all(len(Root(f"{base}/a{n}").files()) == 2 for n in range(TURNS))


def test_fingerprints_follow_content_not_attempts(tmp_path: Path) -> None:
    one, same, other = (commit(tmp_path / n, a=d) for n, d in (("1", b"x"), ("2", b"x"), ("3", b"y")))
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
        Artefact(Root(str(tmp_path))).read("a")


def test_manifests_are_readable(tmp_path: Path) -> None:
    commit(tmp_path, a=b"x")
    found = json.loads((tmp_path / "manifest.json").read_text())
    assert (found["kind"], found["facts"], found["inputs"]) == ("test", {"count": 1}, {"from": "x"})


@pytest.mark.parametrize(
    "values", [{"files": {"../../a": {}}}, {"attempt": "/etc"}, {"format": 9}, {"files": {"a": {}}}]
)
def test_a_manifest_that_is_sealed_but_not_ours_is_one_sentence(tmp_path: Path, values: dict[str, Any]) -> None:
    """Whoever can write manifests can seal them: what they name is still held within the folder."""
    commit(tmp_path, a=b"x")
    manifest = tmp_path / "manifest.json"
    found = json.loads(manifest.read_text()) | values
    del found["seal"]
    sealed = found | {"seal": hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()}
    manifest.write_text(json.dumps(sealed))
    with pytest.raises(StorageError, match=r"manifest\.json"):
        Artefact(Root(str(tmp_path))).read("a")

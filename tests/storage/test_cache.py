"""The cache of fetched files: bounded, checked, and shared by processes."""

from __future__ import annotations

import fcntl
import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from secateur.errors import StorageError
from secateur.storage.cache import ContentMismatch, FileCache
from secateur.storage.folder import Folder
from secateur.storage.outputs import Output


@pytest.fixture(autouse=True)
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of 2,500 bytes."""
    monkeypatch.setenv("SECATEUR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("SECATEUR_CACHE_BYTES", "2500")
    return tmp_path / "cache"


def hold(data: bytes, fetched: list[bytes], sent: bytes | None = None) -> bytes:
    """What the cache gives for `data`, where the store sends `sent`."""

    def fetch(path: str) -> None:
        fetched.append(data)
        Path(path).write_bytes(data if sent is None else sent)

    with FileCache().open_cached(len(data), hashlib.sha256(data).hexdigest(), fetch) as path:
        return path.read_bytes()


def held(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def test_what_was_used_last_stays_and_the_rest_makes_room(small: Path) -> None:
    one, two, three = (bytes([n]) * 1000 for n in range(3))
    fetched: list[bytes] = []
    for age, data in enumerate((one, two)):
        assert hold(data, fetched) == data
        os.utime(small / hashlib.sha256(data).hexdigest(), (1000 + age, 1000 + age))
    assert hold(one, fetched) == one  # used again: now two is the oldest
    assert hold(three, fetched) == three
    assert held(small) == 2000
    assert hold(one, fetched) == one
    assert fetched == [one, two, three]
    assert hold(two, fetched) == two
    assert fetched[-1] == two


def test_a_copy_that_was_changed_is_fetched_anew(small: Path) -> None:
    fetched: list[bytes] = []
    hold(b"a" * 100, fetched)
    (small / hashlib.sha256(b"a" * 100).hexdigest()).write_bytes(b"b" * 100)
    assert hold(b"a" * 100, fetched) == b"a" * 100
    assert len(fetched) == 2


@pytest.mark.parametrize("sent", [b"", b"a" * 99, b"a" * 99 + b"b"])
def test_what_is_not_what_was_committed_never_enters(small: Path, sent: bytes) -> None:
    with pytest.raises(ContentMismatch):
        hold(b"a" * 100, [], sent)
    assert held(small) == 0


def test_a_file_that_cannot_fit_is_one_sentence() -> None:
    with pytest.raises(
        StorageError, match=r"more than the local cache .* may hold .*SECATEUR_CACHE_BYTES"
    ):
        hold(b"x" * 2501, [])


def test_a_limit_that_is_no_number_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECATEUR_CACHE_BYTES", "lots")
    with pytest.raises(StorageError, match="give a number of bytes"):
        hold(b"x", [])


WORKER = """
import sys, hashlib
from pathlib import Path
from secateur.storage.cache import FileCache
for turn in range(150):
    data = bytes([(turn * int(sys.argv[1])) % 7]) * 1000
    with FileCache().open_cached(1000, hashlib.sha256(data).hexdigest(), lambda path: Path(path).write_bytes(data)) as path:
        assert path.read_bytes() == data
"""


def test_processes_that_evict_one_another_still_read_what_they_asked_for(small: Path) -> None:
    workers = [
        subprocess.Popen([sys.executable, "-c", WORKER, str(n)], stderr=subprocess.PIPE)
        for n in (1, 2, 3)
    ]
    errors = [worker.communicate()[1] for worker in workers]
    assert errors == [b"", b"", b""]
    assert held(small) <= 2500


def test_an_artefact_that_changed_is_refused_when_read(base: str) -> None:
    artefact = Output(Folder(f"{base}/artefact"))
    with artefact.attempt("test", {}) as attempt:
        attempt.write("a", b"x" * 1000)
    with artefact.root.open(f"{artefact.manifest.attempt}/a", "wb") as file:
        file.write(b"x" * 999 + b"y")
    with pytest.raises(StorageError, match=r"/a is damaged; restore it"):
        artefact.read("a")
    with pytest.raises(StorageError, match=r"/a is damaged; restore it"), artefact.local("a"):
        pass


def test_drafts_whose_writer_was_killed_make_room_and_those_being_written_stay(small: Path) -> None:
    """A draft that is left would count against the limit for ever."""
    script = "import os, fcntl, sys; f = open(sys.argv[1], 'wb'); fcntl.flock(f, fcntl.LOCK_EX); f.write(bytes(1000)); f.flush(); os.kill(os.getpid(), 9)"
    small.mkdir()
    subprocess.run([sys.executable, "-c", script, str(small / "draft-left")], check=False)
    with open(small / "draft-written", "wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write(bytes(500))
        file.flush()
        assert hold(b"a" * 2000, []) == b"a" * 2000
        assert not (small / "draft-left").exists()
        assert (small / "draft-written").exists()

"""Tests of the cache of downloaded files: bounded, checked, and shared by processes."""

from __future__ import annotations

import fcntl
import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from secateur.errors import StorageError
from secateur.storage.cache import FileCache
from secateur.storage.file_check import ContentMismatch
from secateur.storage.folder import Folder
from secateur.storage.outputs import Output


@pytest.fixture(autouse=True)
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a cache of 2,500 bytes."""
    monkeypatch.setenv("SECATEUR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("SECATEUR_CACHE_BYTES", "2500")
    return tmp_path / "cache"


def read_cached(data: bytes, downloads: list[bytes], sent: bytes | None = None) -> bytes:
    """Read `data` through the cache.

    Args:
        data: the content.
        downloads: the content is appended to this list if it is downloaded.
        sent: the bytes that the store sends instead.
    """

    def download(path: str) -> None:
        downloads.append(data)
        Path(path).write_bytes(data if sent is None else sent)

    with FileCache().open_cached(len(data), hashlib.sha256(data).hexdigest(), download) as path:
        return path.read_bytes()


def total_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def test_least_recently_used_files_are_evicted(cache_folder: Path) -> None:
    one, two, three = (bytes([n]) * 1000 for n in range(3))
    downloads: list[bytes] = []
    for age, data in enumerate((one, two)):
        assert read_cached(data, downloads) == data
        os.utime(cache_folder / hashlib.sha256(data).hexdigest(), (1000 + age, 1000 + age))
    assert read_cached(one, downloads) == one  # now `two` is the least recently used
    assert read_cached(three, downloads) == three
    assert total_bytes(cache_folder) == 2000
    assert read_cached(one, downloads) == one
    assert downloads == [one, two, three]
    assert read_cached(two, downloads) == two
    assert downloads[-1] == two


def test_changed_copy_is_downloaded_again(cache_folder: Path) -> None:
    downloads: list[bytes] = []
    read_cached(b"a" * 100, downloads)
    (cache_folder / hashlib.sha256(b"a" * 100).hexdigest()).write_bytes(b"b" * 100)
    assert read_cached(b"a" * 100, downloads) == b"a" * 100
    assert len(downloads) == 2


@pytest.mark.parametrize("sent", [b"", b"a" * 99, b"a" * 99 + b"b"])
def test_wrong_content_is_never_cached(cache_folder: Path, sent: bytes) -> None:
    with pytest.raises(ContentMismatch):
        read_cached(b"a" * 100, [], sent)
    assert total_bytes(cache_folder) == 0


def test_file_larger_than_the_cache_is_an_error() -> None:
    with pytest.raises(
        StorageError, match=r"more than the local cache .* may hold .*SECATEUR_CACHE_BYTES"
    ):
        read_cached(b"x" * 2501, [])


def test_limit_that_is_no_number_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECATEUR_CACHE_BYTES", "lots")
    with pytest.raises(StorageError, match="give a number of bytes"):
        read_cached(b"x", [])


WORKER = """
import sys, hashlib
from pathlib import Path
from secateur.storage.cache import FileCache
for turn in range(150):
    data = bytes([(turn * int(sys.argv[1])) % 7]) * 1000
    sha256 = hashlib.sha256(data).hexdigest()
    download = lambda path: Path(path).write_bytes(data)
    with FileCache().open_cached(1000, sha256, download) as path:
        assert path.read_bytes() == data
"""


def test_processes_that_evict_each_other_read_correct_files(cache_folder: Path) -> None:
    workers = [
        subprocess.Popen([sys.executable, "-c", WORKER, str(n)], stderr=subprocess.PIPE)
        for n in (1, 2, 3)
    ]
    errors = [worker.communicate()[1] for worker in workers]
    assert errors == [b"", b"", b""]
    assert total_bytes(cache_folder) <= 2500


def test_changed_file_is_refused_when_read(base: str) -> None:
    output = Output(Folder(f"{base}/output"))
    with output.attempt("test", {}) as attempt:
        attempt.write("a", b"x" * 1000)
    with output.root.open(f"{output.manifest.attempt}/a", "wb") as file:
        file.write(b"x" * 999 + b"y")
    with pytest.raises(StorageError, match=r"/a is damaged; restore it"):
        output.read("a")
    with pytest.raises(StorageError, match=r"/a is damaged; restore it"), output.local("a"):
        pass


KILLED_WRITER = """
import fcntl, os, sys
file = open(sys.argv[1], "wb")
fcntl.flock(file, fcntl.LOCK_EX)
file.write(bytes(1000))
file.flush()
os.kill(os.getpid(), 9)
"""


def test_only_drafts_of_killed_writers_are_evicted(cache_folder: Path) -> None:
    """An abandoned draft would count towards the limit forever."""
    cache_folder.mkdir()
    subprocess.run(
        [sys.executable, "-c", KILLED_WRITER, str(cache_folder / "draft-left")], check=False
    )
    with open(cache_folder / "draft-written", "wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write(bytes(500))
        file.flush()
        assert read_cached(b"a" * 2000, []) == b"a" * 2000
        assert not (cache_folder / "draft-left").exists()
        assert (cache_folder / "draft-written").exists()

"""Folders, on the local disk and on two S3 servers, by the same tests; and a disk that is full."""

from __future__ import annotations

import errno
import subprocess
import sys
from pathlib import Path

import pytest
from botocore.exceptions import EndpointConnectionError, NoCredentialsError, ReadTimeoutError

from secateur.errors import StorageError, UnavailableError
from secateur.storage.folder import Folder, wrap_io_errors
from secateur.storage.outputs import Output


@pytest.fixture
def root(base: str) -> Folder:
    return Folder(f"{base}/folder")


def test_files_come_back(root: Folder) -> None:
    with root.open("a/b.bin", "wb") as file:
        file.write(b"x" * 7_000_000)
    root.create("c", b"y")
    assert root.files() == ["a/b.bin", "c"]
    assert root.read_bytes("a/b.bin") == b"x" * 7_000_000
    root.remove("c")
    assert not root.exists("c")
    root.delete()
    assert root.files() == []


def test_creating_twice_is_refused_and_changes_nothing(root: Folder) -> None:
    root.create("a", b"first")
    with pytest.raises(FileExistsError):
        root.create("a", b"second")
    assert root.read_bytes("a") == b"first"


def test_a_place_that_keeps_the_first_of_two_says_so_and_is_left_as_it_was(root: Folder) -> None:
    assert root.supports_conditional_put()
    assert root.files() == []


def test_a_store_that_ignores_conditions_is_found_out(rclone: str) -> None:
    assert not Folder(f"{rclone}/folder").supports_conditional_put()
    assert Folder(f"{rclone}/folder").files() == []


def test_artefacts(root: Folder) -> None:
    artefact = Output(root)
    with artefact.attempt("test", {}) as attempt:
        attempt.write("a", b"one")
    assert Output(root).read("a") == b"one"
    artefact.remove()
    assert root.files() == []


def test_what_is_missing_is_named(root: Folder) -> None:
    with pytest.raises(StorageError, match="nothing does not exist"):
        root.read_bytes("nothing")


FILL = """
import sys
from secateur.errors import StorageError
from secateur.storage.outputs import Output
from secateur.storage.folder import Folder
artefact = Output(Folder(sys.argv[1] + "/artefact"))
try:
    with artefact.attempt("test", {}) as attempt:
        attempt.write("big", bytes(4 << 20))
except StorageError as error:
    print(error)
print(artefact.committed, artefact.root.files())
"""


def test_a_full_disk_is_one_sentence_and_leaves_nothing(tmp_path: Path) -> None:
    """In a mount namespace of its own, on a tmpfs of 1 MiB."""
    script = (
        f"mount -t tmpfs -o size=1m none {tmp_path} && exec {sys.executable} -c '{FILL}' {tmp_path}"
    )
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", script], capture_output=True, text=True, check=False
    )
    if "unshare" in done.stderr or "mount" in done.stderr:
        pytest.skip("this system allows no mount namespaces")
    assert done.returncode == 0, done.stderr
    sentence, state = done.stdout.splitlines()
    assert "cannot be written: No space left on device; free some space" in sentence
    assert state == "False []"


def test_a_file_of_another_folder_is_taken_as_it_is(root: Folder) -> None:
    other = root.child("other")
    other.create("deep/a", b"x" * 100)
    root.link_or_copy(other, "deep/a")
    other.delete()
    assert root.files() == ["deep/a"]
    assert root.read_bytes("deep/a") == b"x" * 100


@pytest.mark.parametrize(
    ("error", "passes"),
    [
        (OSError(errno.EIO, "input/output error"), True),
        (OSError(errno.ESTALE, "stale handle"), True),
        (OSError("the server said 503"), True),
        (TimeoutError("no answer"), True),
        (ConnectionResetError(errno.ECONNRESET, "reset"), True),
        (EndpointConnectionError(endpoint_url="http://store"), True),
        (ReadTimeoutError(endpoint_url="http://store"), True),
        (OSError(errno.EREMOTEIO, "internal error"), True),
        (OSError(errno.EBUSY, "slow down"), True),
        (OSError(errno.ENOSPC, "full"), False),
        (OSError(errno.EINVAL, "bad request"), False),
        (PermissionError("access denied"), False),
        (IsADirectoryError(errno.EISDIR, "a folder"), False),
        (FileNotFoundError(errno.ENOENT, "gone"), False),
        (NoCredentialsError(), False),
    ],
)
def test_what_can_pass_is_told_from_what_cannot(error: Exception, passes: bool) -> None:
    with pytest.raises(StorageError) as raised, wrap_io_errors("a file", "read"):
        raise error
    assert isinstance(raised.value, UnavailableError) is passes

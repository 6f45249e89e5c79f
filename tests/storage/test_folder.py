"""Tests of folders on a local disk and two S3 servers, and of a full disk."""

from __future__ import annotations

import errno
import subprocess
import sys
from pathlib import Path

import pytest
from botocore.exceptions import EndpointConnectionError, NoCredentialsError, ReadTimeoutError

from secateur.errors import StorageError, UnavailableError
from secateur.storage.folder import Folder
from secateur.storage.io_errors import wrap_io_errors
from secateur.storage.outputs import Output


@pytest.fixture
def root(base: str) -> Folder:
    return Folder(f"{base}/folder")


def test_written_files_are_read_back(root: Folder) -> None:
    with root.open("a/b.bin", "wb") as file:
        file.write(b"x" * 7_000_000)
    root.create("c", b"y")
    assert root.files() == ["a/b.bin", "c"]
    assert root.read_bytes("a/b.bin") == b"x" * 7_000_000
    root.remove("c")
    assert not root.exists("c")
    root.delete()
    assert root.files() == []


def test_second_create_is_refused_and_changes_nothing(root: Folder) -> None:
    root.create("a", b"first")
    with pytest.raises(FileExistsError):
        root.create("a", b"second")
    assert root.read_bytes("a") == b"first"


def test_conditional_put_is_detected_and_leaves_no_file(root: Folder) -> None:
    assert root.supports_conditional_put()
    assert root.files() == []


def test_store_that_ignores_conditional_puts_is_detected(rclone: str) -> None:
    assert not Folder(f"{rclone}/folder").supports_conditional_put()
    assert Folder(f"{rclone}/folder").files() == []


def test_outputs(root: Folder) -> None:
    output = Output(root)
    with output.attempt("test", {}) as attempt:
        attempt.write("a", b"one")
    assert Output(root).read("a") == b"one"
    output.remove()
    assert root.files() == []


def test_missing_file_is_named(root: Folder) -> None:
    with pytest.raises(StorageError, match="nothing does not exist"):
        root.read_bytes("nothing")


FILL = """
import sys
from secateur.errors import StorageError
from secateur.storage.outputs import Output
from secateur.storage.folder import Folder
output = Output(Folder(sys.argv[1] + "/output"))
try:
    with output.attempt("test", {}) as attempt:
        attempt.write("big", bytes(4 << 20))
except StorageError as error:
    print(error)
print(output.committed, output.root.files())
"""


def test_full_disk_is_an_error_and_leaves_no_file(tmp_path: Path) -> None:
    """A separate mount namespace provides a tmpfs of 1 MiB."""
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


def test_file_of_another_folder_is_linked_or_copied(root: Folder) -> None:
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
def test_transient_errors_are_distinguished_from_permanent_ones(
    error: Exception, passes: bool
) -> None:
    with pytest.raises(StorageError) as raised, wrap_io_errors("a file", "read"):
        raise error
    assert isinstance(raised.value, UnavailableError) is passes

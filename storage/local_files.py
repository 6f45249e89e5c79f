"""Files on a local disk that survive a crash: whole when they appear, and flushed to the disk."""

from __future__ import annotations

import os
import uuid
from contextlib import suppress
from pathlib import Path


def create_file(path: str, data: bytes) -> None:
    """Create a whole file, or raise FileExistsError."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    draft = f"{path}.{uuid.uuid4().hex}"
    try:
        with open(draft, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        # A hard link appears with the whole content in one step, and fails if the name exists. A
        # rename would replace an existing file.
        os.link(draft, path)
        fsync_folder(Path(path).parent)
    finally:
        with suppress(FileNotFoundError):
            os.unlink(draft)


def fsync_file(path: Path) -> None:
    """Flush a file or folder to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def fsync_folder(path: Path) -> None:
    """Flush a folder to the disk, if possible."""
    # It may belong to another user, or its file system may not support this.
    with suppress(OSError):
        fsync_file(path)

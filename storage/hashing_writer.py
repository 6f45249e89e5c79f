"""A file writer that counts and hashes the written bytes, while the disk writes them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import IO

# Smaller pieces are hashed by the calling thread: handing them over would cost more.
LARGE = 1 << 18
WRITEBACK = 8 << 20

Data = bytes | memoryview


class HashingWriter:
    """A writer that hashes large pieces in another thread while this thread writes them.

    Attributes:
        size: bytes written.
        digest: their SHA-256, complete once `hash_while_writing` is left.
    """

    def __init__(self, file: IO[bytes], executor: ThreadPoolExecutor) -> None:
        self.size = 0
        self.digest = hashlib.sha256()
        self._file = file
        self._executor = executor
        self._written_back = 0

    def write(self, data: Data) -> int:
        """Write data, and return its size in bytes."""
        size = memoryview(data).nbytes
        if size >= LARGE:
            self.write_pieces([data]).result()
            return size
        self.size += size
        self.digest.update(data)
        return self._file.write(data)

    def write_pieces(self, pieces: Sequence[Data]) -> Future[None]:
        """Write pieces, and return a future of their hashing.

        The memory of the pieces may be reused once the future is done.
        """
        hashing = self._executor.submit(self._update_digest, pieces)
        for piece in pieces:
            self._file.write(piece)
            self.size += memoryview(piece).nbytes
        if self.size - self._written_back >= WRITEBACK:
            self._start_writeback()
        return hashing

    def flush(self) -> None:
        """Flush the file."""
        self._file.flush()

    def writable(self) -> bool:
        """Return True, as a file open for writing does."""
        return True

    @property
    def closed(self) -> bool:
        """Whether the file is closed."""
        return self._file.closed

    def _update_digest(self, pieces: Sequence[Data]) -> None:
        for piece in pieces:
            self.digest.update(piece)

    def _start_writeback(self) -> None:
        """Make the disk start to write, so that `Folder.fsync` has little left to wait for."""
        start = self._written_back
        # On Linux this advice starts the writing, and drops no page that is not on the disk yet.
        # Other systems and stores have no such call.
        with suppress(OSError, AttributeError):
            os.posix_fadvise(self._file.fileno(), start, self.size - start, os.POSIX_FADV_DONTNEED)
        self._written_back = self.size


@contextmanager
def hash_while_writing(file: IO[bytes]) -> Iterator[HashingWriter]:
    """Provide the hashing writer of a file. The digest is complete after the block."""
    # One thread keeps the pieces in order. Leaving the executor waits for it.
    with ThreadPoolExecutor(1) as executor:
        yield HashingWriter(file, executor)

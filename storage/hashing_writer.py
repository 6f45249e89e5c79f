"""Room `storage`: a file's writing end that counts and hashes what passes, while the disk writes."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import IO

LARGE = 1 << 18
WRITEBACK = 8 << 20

Data = bytes | memoryview


class HashingWriter:
    """What is written is hashed by a thread beside, where it is large, while this one writes.

    Attributes:
        size: bytes written.
        digest: their sha256, whole once `hashed` is left.
    """

    def __init__(self, file: IO[bytes], beside: ThreadPoolExecutor) -> None:
        self._file, self._beside, self.size, self.digest, self._pushed = (
            file,
            beside,
            0,
            hashlib.sha256(),
            0,
        )

    def write(self, data: Data) -> int:
        size = memoryview(data).nbytes
        if size >= LARGE:
            self.send([data]).result()
            return size
        self.size += size
        self.digest.update(data)
        return self._file.write(data)

    def send(self, pieces: Sequence[Data]) -> Future[None]:
        """Writes pieces, of which the memory may be used for something else once the future is done."""
        hashing = self._beside.submit(self._update, pieces)
        for piece in pieces:
            self._file.write(piece)
            self.size += memoryview(piece).nbytes
        if self.size - self._pushed >= WRITEBACK:
            self._push()
        return hashing

    def flush(self) -> None:
        self._file.flush()

    def writable(self) -> bool:
        return True

    @property
    def closed(self) -> bool:
        return self._file.closed

    def _update(self, pieces: Sequence[Data]) -> None:
        for piece in pieces:
            self.digest.update(piece)

    def _push(self) -> None:
        """Has the disk begin with what was written, so that little is left to wait for in the end (`Root.settle`). On Linux
        this advice does so, and lets nothing go that isn't on the disk yet; other systems and stores have no such thing."""
        with suppress(OSError, AttributeError):
            os.posix_fadvise(
                self._file.fileno(), self._pushed, self.size - self._pushed, os.POSIX_FADV_DONTNEED
            )
        self._pushed = self.size


@contextmanager
def hash_while_writing(file: IO[bytes]) -> Iterator[HashingWriter]:
    """The hashing end of a file; all is hashed once the block is left."""
    with ThreadPoolExecutor(1) as beside:
        yield HashingWriter(file, beside)

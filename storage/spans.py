"""Room `storage`: the bytes of a sample in its shard, and their sha256, by which a change after listing is seen."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence

import polars as pl

from storage.errors import StorageError
from storage.tars import BUFFER, open_shard

Span = tuple[int, int]


def spans(frame: pl.DataFrame) -> list[Span]:
    """Of each listed sample, where its first member's header begins and its last member's payload ends."""
    ends = pl.col("offsets").list.last() + pl.col("sizes").list.last()
    return frame.select(pl.col("begins").list.first(), ends).rows()


def hash_spans(url: str, of: Sequence[Span]) -> Iterator[bytes]:
    """The sha256 of each of a shard's spans, in order, by chunks of a megabyte.

    Raises:
        StorageError: the shard is shorter than that.
    """
    with open_shard(url) as file:
        for start, stop in of:
            file.seek(start)
            digest = hashlib.sha256()
            while start < stop:
                data = file.read(min(BUFFER, stop - start))
                if not data:
                    raise changed(url)
                digest.update(data)
                start += len(data)
            yield digest.digest()


def check_span(url: str, key: str, data: bytes, sha256: bytes) -> None:
    """Holds a sample's bytes against what was listed.

    Raises:
        StorageError: they are others.
    """
    if hashlib.sha256(data).digest() != sha256:
        raise changed(url, key)


class Checking:
    """Holds the bytes of a shard, passed on in any pieces but in order, against what was listed of some samples."""

    def __init__(self, url: str, keys: Iterable[str], of: Iterable[Span], sha256: Iterable[bytes]) -> None:
        self._url, self._expected = url, list(zip(keys, of, sha256, strict=True))[::-1]
        self._digest = hashlib.sha256()

    def update(self, start: int, data: bytes) -> None:
        """Takes the bytes that begin at `start`.

        Raises:
            StorageError: a sample that ends within them is another than was listed.
        """
        view, stop = memoryview(data), start + len(data)
        while self._expected:
            key, (begin, end), sha256 = self._expected[-1]
            self._digest.update(view[max(begin - start, 0) : max(end - start, 0)])
            if end > stop:
                return
            if self._digest.digest() != sha256:
                raise changed(self._url, key)
            self._digest = hashlib.sha256()
            self._expected.pop()


def changed(url: str, key: str | None = None) -> StorageError:
    """What to say of a shard that isn't what was listed."""
    sample = f"; its sample {key} is another" if key is not None else ""
    return StorageError(
        f"shard {url} has changed since it was listed{sample}; restore it, or start a run of another name on the new data"
    )

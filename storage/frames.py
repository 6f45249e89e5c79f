"""Room `storage`: polars frames as Parquet files."""

from __future__ import annotations

import io

import polars as pl

from secateur.errors import StorageError
from secateur.storage.outputs import Attempt, Output


def write_frame(attempt: Attempt, name: str, frame: pl.DataFrame) -> None:
    """Writes a frame; the same frame gives the same bytes."""
    buffer = io.BytesIO()
    frame.write_parquet(buffer, compression="zstd", statistics=True)
    attempt.write(name, buffer.getvalue())


def read_frame(artefact: Output, name: str, columns: list[str] | None = None) -> pl.DataFrame:
    """Reads a frame, or some of its columns.

    Raises:
        StorageError: the file is damaged.
    """
    try:
        with artefact.local(name) as path:
            return pl.read_parquet(path, columns=columns, memory_map=False)
    except (pl.exceptions.PolarsError, OSError) as error:
        raise StorageError(
            f"{artefact.url(name)} is damaged ({error}); restore it or run that step again"
        ) from error

"""Polars frames as Parquet files."""

from __future__ import annotations

import io
from collections.abc import Mapping

import polars as pl

from secateur.errors import StorageError
from secateur.storage.attempt import Attempt
from secateur.storage.outputs import Output
from secateur.storage.schemas import Schema


def write_frame(attempt: Attempt, name: str, frame: pl.DataFrame, schema: Schema) -> None:
    """Write a frame. The same frame always gives the same bytes.

    Args:
        attempt: the output to write to.
        name: the file's name.
        frame: the frame.
        schema: the columns that the frame must have, from `secateur.storage.schemas`.

    Raises:
        ValueError: the frame has other columns or data types than the schema.
    """
    check_schema(name, frame.schema, schema)
    buffer = io.BytesIO()
    frame.write_parquet(buffer, compression="zstd", statistics=True)
    attempt.write(name, buffer.getvalue())


def check_schema(name: str, schema: Mapping[str, pl.DataType], expected: Schema) -> None:
    """Check that a frame has the expected columns in the expected order.

    Raises:
        ValueError: it has others. This is an error of the program, not of the user.
    """
    differences = [
        f"{column} is {schema.get(column, 'missing')}, not {expected.get(column, 'expected')}"
        for column in {**expected, **schema}
        if not _matches(schema.get(column), expected.get(column))
    ]
    if not differences and list(schema) != list(expected):
        differences = [f"the order is {', '.join(schema)}, not {', '.join(expected)}"]
    if differences:
        raise ValueError(f"the frame {name} does not have its schema: {'; '.join(differences)}")


def _matches(dtype: pl.DataType | None, expected: pl.DataType | type[pl.DataType] | None) -> bool:
    # Polars infers the data type Null for a column without any value.
    return expected is not None and dtype in (expected, pl.Null)


def read_frame(output: Output, name: str, columns: list[str] | None = None) -> pl.DataFrame:
    """Return a frame, or only some of its columns.

    Raises:
        StorageError: the file is damaged.
    """
    try:
        with output.local(name) as path:
            return pl.read_parquet(path, columns=columns, memory_map=False)
    except (pl.exceptions.PolarsError, OSError) as error:
        raise StorageError(
            f"{output.url(name)} is damaged ({error}); restore it or run that step again"
        ) from error

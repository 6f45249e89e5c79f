"""Tests of frames: they are read back as written, and must have their schema."""

from __future__ import annotations

from pathlib import Path

import polars as pl
import pytest

from secateur.storage.folder import Folder
from secateur.storage.frames import read_frame, write_frame
from secateur.storage.outputs import Output

SCHEMA = {"key": pl.String, "score": pl.Float64}
FRAME = pl.DataFrame({"key": ["a", "b"], "score": [0.5, 1.5]})


def test_written_frame_is_read_back(tmp_path: Path) -> None:
    output = Output(Folder(str(tmp_path)))
    with output.attempt("test", {}) as attempt:
        write_frame(attempt, "a.parquet", FRAME, SCHEMA)
    assert read_frame(output, "a.parquet").equals(FRAME)
    assert read_frame(output, "a.parquet", ["score"]).equals(FRAME.select("score"))


def test_column_without_values_may_have_no_data_type(tmp_path: Path) -> None:
    frame = pl.DataFrame({"key": ["a"], "score": [None]})
    with Output(Folder(str(tmp_path))).attempt("test", {}) as attempt:
        write_frame(attempt, "a.parquet", frame, SCHEMA)


@pytest.mark.parametrize(
    ("frame", "difference"),
    [
        (FRAME.drop("score"), "score is missing, not Float64"),
        (FRAME.with_columns(more=1), "more is Int32, not expected"),
        (FRAME.cast({"score": pl.Float32}), "score is Float32, not Float64"),
        (FRAME.select("score", "key"), "the order is score, key, not key, score"),
    ],
)
def test_frame_without_its_schema_is_an_error(
    tmp_path: Path, frame: pl.DataFrame, difference: str
) -> None:
    output = Output(Folder(str(tmp_path)))
    with (
        pytest.raises(ValueError, match=f"the frame a.parquet .*: {difference}"),
        output.attempt("test", {}) as attempt,
    ):
        write_frame(attempt, "a.parquet", frame, SCHEMA)
    assert output.root.files() == []

"""Tests of mutated files: an error of one sentence or the original content, never a crash."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import faiss
import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from secateur.errors import StorageError
from secateur.storage.faiss_index import build_index, read_index, write_index
from secateur.storage.folder import Folder
from secateur.storage.frames import read_frame, write_frame
from secateur.storage.ledger import read_ledger, write_ledger
from secateur.storage.outputs import Output
from secateur.storage.rewrite import rewrite_shards
from secateur.storage.shard_listing import list_shards
from secateur.storage.shards import Samples
from tests.storage.test_shards import write_tar

pytestmark = pytest.mark.slow

FUZZ = settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
Mutation = Callable[[bytes], bytes]
# Counts of what happened to mutated files, by kind and outcome, for `benchmarks.fuzz`.
OUTCOMES = Counter[tuple[str, str]]()


@st.composite
def mutations(draw: st.DrawFn) -> Mutation:
    """Draw a few edits of bytes, at positions that are fractions of the length."""
    place = st.floats(0, 1, exclude_max=True)
    kind = st.sampled_from(["flip", "cut", "drop", "insert", "repeat", "zero", "digits"])
    edits = draw(
        st.lists(
            st.tuples(kind, place, place, st.binary(min_size=1, max_size=20)),
            min_size=1,
            max_size=4,
        )
    )

    def mutate(data: bytes) -> bytes:
        for edit, start, length, extra in edits:
            at = int(start * len(data))
            to = min(len(data), at + 1 + int(length * min(1024, len(data))))
            middle = {
                "flip": bytes(b ^ extra[0] for b in data[at : at + 1]) + data[at + 1 : to],
                "cut": b"",
                "drop": b"",
                "insert": extra + data[at:to],
                "repeat": data[at:to] * 2,
                "zero": bytes(to - at),
                "digits": data[at:to].replace(b"0", b"7"),
            }[edit]
            data = data[:at] + middle + (b"" if edit == "cut" else data[to:])
        return data

    return mutate


@contextmanager
def temporary_folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


def write_shard(where: Path) -> str:
    """Write a shard of six samples with two members each.

    Some names are so long that they need extra headers.
    """
    rng = np.random.default_rng(0)
    members = [
        (f"{'d' * (1 + 90 * (n % 2))}/{n:03d}.{ext}", rng.bytes(200 + 300 * n))
        for n in range(6)
        for ext in ("bin", "cls")
    ]
    return write_tar(where / "a.tar", members)


def count_refused(kind: str, error: StorageError) -> None:
    """Check that an error is one sentence, and count it."""
    assert "\n" not in str(error)
    OUTCOMES[kind, "refused"] += 1


def count_accepted(kind: str, changed: bool) -> None:
    """Count a file that was read correctly."""
    OUTCOMES[
        kind, "read, and the same as before" if changed else "not changed by the mutation"
    ] += 1


def damage(path: Path, mutate: Mutation) -> bool:
    """Mutate a file, and return whether its content has changed."""
    before = path.read_bytes()
    path.write_bytes(mutate(before))
    return path.read_bytes() != before


@FUZZ
@given(mutations())
def test_mutated_shard_is_listed_within_its_bounds_or_refused(mutate: Mutation) -> None:
    with temporary_folder() as where:
        url = write_shard(where)
        damage(Path(url), mutate)
        try:
            frame = list_shards([url])
        except StorageError as error:
            count_refused("shard, before listing", error)
            return
        OUTCOMES["shard, before listing", "listed: a whole tar"] += 1
        size = Path(url).stat().st_size
        ends = frame.select((pl.col("offsets") + pl.col("sizes")).explode()).to_series()
        assert all(end <= size for end in ends)
        assert len(Samples([url], frame).read(range(len(frame)))) == len(frame)


@FUZZ
@given(mutations())
def test_shard_mutated_after_listing_gives_same_samples_or_is_refused(
    mutate: Mutation,
) -> None:
    with temporary_folder() as where:
        url = write_shard(where)
        before = Path(url).read_bytes()
        frame = list_shards([url])
        samples = Samples([url], frame)
        expected = samples.read(range(6))
        changed = damage(Path(url), mutate)
        try:
            assert Samples([url], frame).read(range(6)) == expected
            count_accepted("shard, read after listing", changed)
        except StorageError as error:
            count_refused("shard, read after listing", error)
        output = Output(Folder(str(where / "out")))
        try:
            with output.attempt("prune", {}) as attempt:
                rewrite_shards(attempt, [url], frame, np.ones(6, bool))
        except StorageError as error:
            count_refused("shard, rewritten after listing", error)
            assert output.root.files() == []
            return
        assert Path(output.url("shards/a.tar")).read_bytes() == before
        count_accepted("shard, rewritten after listing", changed)


FRAME = pl.DataFrame({"key": [f"k{n}" for n in range(200)], "score": np.linspace(0, 1, 200)})
LEDGER = {"contributions": torch.arange(600.0).reshape(20, 30), "rows": torch.arange(20)}
VECTORS = np.random.default_rng(0).normal(size=(50, 8)).astype(np.float32)


def commit(where: Path) -> Output:
    output = Output(Folder(str(where / "output")))
    with output.attempt("test", {"from": "x"}) as attempt:
        write_frame(attempt, "frame.parquet", FRAME, FRAME.schema)
        write_ledger(attempt, LEDGER, 7)
        write_index(attempt, build_index([VECTORS], "flat", 8))
        attempt.facts["count"] = 3
    return output


def read_back(output: Output) -> None:
    """Read every file, and compare it with the content that was written."""
    assert read_frame(output, "frame.parquet").equals(FRAME)
    tensors, first = read_ledger(output)
    assert first == 7
    assert all(torch.equal(tensors[name], LEDGER[name]) for name in LEDGER)
    index = read_index(output)
    assert np.array_equal(faiss.rev_swig_ptr(index.get_xb(), 400).reshape(50, 8), VECTORS)
    assert (output.manifest.facts, output.manifest.inputs) == ({"count": 3}, {"from": "x"})


@pytest.mark.parametrize(
    "name", ["manifest.json", "frame.parquet", "ledger.safetensors", "index.faiss"]
)
@FUZZ
@given(mutations())
def test_mutated_output_reads_as_committed_or_is_refused(name: str, mutate: Mutation) -> None:
    with temporary_folder() as where:
        output = commit(where)
        place = name if name == "manifest.json" else f"{output.manifest.attempt}/{name}"
        changed = damage(where / "output" / place, mutate)
        try:
            read_back(Output(output.root))
            count_accepted(name, changed)
        except StorageError as error:
            count_refused(name, error)

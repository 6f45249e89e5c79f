"""Mutated files of every kind: an error in one sentence, or what was there before; never a crash or another content."""

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
from secateur.storage.shards import Samples, list_shards
from tests.storage.test_shards import write_tar

pytestmark = pytest.mark.slow

FUZZ = settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
Mutation = Callable[[bytes], bytes]
OUTCOMES = Counter[
    tuple[str, str]
]()  # what became of mutated files, by kind, for `benchmarks.fuzz`


@st.composite
def mutations(draw: st.DrawFn) -> Mutation:
    """Some flips, cuts, insertions, repetitions and swaps, at places given as shares of the length."""
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
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


def shard(where: Path) -> str:
    """Six samples of two members, the names of some in headers of their own."""
    rng = np.random.default_rng(0)
    members = [
        (f"{'d' * (1 + 90 * (n % 2))}/{n:03d}.{ext}", rng.bytes(200 + 300 * n))
        for n in range(6)
        for ext in ("bin", "cls")
    ]
    return write_tar(where / "a.tar", members)


def refused(kind: str, error: StorageError) -> None:
    """An error is one sentence."""
    assert "\n" not in str(error)
    OUTCOMES[kind, "refused"] += 1


def accepted(kind: str, changed: bool) -> None:
    OUTCOMES[
        kind, "read, and the same as before" if changed else "not changed by the mutation"
    ] += 1


def damage(path: Path, mutate: Mutation) -> bool:
    """Whether the file is another now."""
    before = path.read_bytes()
    path.write_bytes(mutate(before))
    return path.read_bytes() != before


@FUZZ
@given(mutations())
def test_a_mutated_shard_is_listed_within_its_bounds_or_refused(mutate: Mutation) -> None:
    with folder() as where:
        url = shard(where)
        damage(Path(url), mutate)
        try:
            frame = list_shards([url])
        except StorageError as error:
            refused("shard, before listing", error)
            return
        OUTCOMES["shard, before listing", "listed: a whole tar"] += 1
        size = Path(url).stat().st_size
        ends = frame.select((pl.col("offsets") + pl.col("sizes")).explode()).to_series()
        assert all(end <= size for end in ends)
        assert len(Samples([url], frame).read(range(len(frame)))) == len(frame)


@FUZZ
@given(mutations())
def test_a_shard_mutated_after_listing_gives_the_same_samples_or_is_refused(
    mutate: Mutation,
) -> None:
    with folder() as where:
        url = shard(where)
        before = Path(url).read_bytes()
        frame = list_shards([url])
        samples = Samples([url], frame)
        expected = samples.read(range(6))
        other = damage(Path(url), mutate)
        try:
            assert Samples([url], frame).read(range(6)) == expected
            accepted("shard, read after listing", other)
        except StorageError as error:
            refused("shard, read after listing", error)
        artefact = Output(Folder(str(where / "out")))
        try:
            with artefact.attempt("prune", {}) as attempt:
                rewrite_shards(attempt, [url], frame, np.ones(6, bool))
        except StorageError as error:
            refused("shard, rewritten after listing", error)
            assert artefact.root.files() == []
            return
        assert Path(artefact.url("shards/a.tar")).read_bytes() == before
        accepted("shard, rewritten after listing", other)


FRAME = pl.DataFrame({"key": [f"k{n}" for n in range(200)], "score": np.linspace(0, 1, 200)})
LEDGER = {"contributions": torch.arange(600.0).reshape(20, 30), "rows": torch.arange(20)}
VECTORS = np.random.default_rng(0).normal(size=(50, 8)).astype(np.float32)


def commit(where: Path) -> Output:
    artefact = Output(Folder(str(where / "artefact")))
    with artefact.attempt("test", {"from": "x"}) as attempt:
        write_frame(attempt, "frame.parquet", FRAME)
        write_ledger(attempt, LEDGER, 7)
        write_index(attempt, build_index([VECTORS], "flat", 8))
        attempt.facts["count"] = 3
    return artefact


def read_back(artefact: Output) -> None:
    """Reads everything, and holds it against what was written."""
    assert read_frame(artefact, "frame.parquet").equals(FRAME)
    tensors, first = read_ledger(artefact)
    assert first == 7
    assert all(torch.equal(tensors[name], LEDGER[name]) for name in LEDGER)
    index = read_index(artefact)
    assert np.array_equal(faiss.rev_swig_ptr(index.get_xb(), 400).reshape(50, 8), VECTORS)
    assert (artefact.manifest.facts, artefact.manifest.inputs) == ({"count": 3}, {"from": "x"})


@pytest.mark.parametrize(
    "name", ["manifest.json", "frame.parquet", "ledger.safetensors", "index.faiss"]
)
@FUZZ
@given(mutations())
def test_a_mutated_artefact_is_what_was_committed_or_refused(name: str, mutate: Mutation) -> None:
    with folder() as where:
        artefact = commit(where)
        place = name if name == "manifest.json" else f"{artefact.manifest.attempt}/{name}"
        other = damage(where / "artefact" / place, mutate)
        try:
            read_back(Output(artefact.root))
            accepted(name, other)
        except StorageError as error:
            refused(name, error)

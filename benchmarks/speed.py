"""Speed of capture, recursion and query, each beside its limit, by turns in one process.

`python -m benchmarks.speed [--repeats 5] [--threads 1]`
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.timing import by_turns, spread
from examples.shards import write_shards
from secateur.influence.basis import KroneckerBasis
from secateur.influence.bindings import bind_layers
from secateur.influence.recorder import Recorder
from secateur.storage.faiss_index import build_index, read_index, search_index, write_index
from secateur.storage.folder import Folder
from secateur.storage.outputs import Output
from secateur.tasks.data.samples import list_stage_samples
from secateur.tasks.plan import Plan
from secateur.tasks.run.run import Run
from secateur.tasks.training.fit_basis import fit_basis
from secateur.tasks.training.train import train_stage
from secateur.tasks.valuation.embed import compose_stage, embed_segment

BLOCKS, WIDTH, BATCH, STEPS = 24, 16, 16, 200


def capture(repeats: int) -> None:
    """A training step with contributions captured, against the same step without."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10)
    )
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    bindings = bind_layers(model)
    sides = ((16, 16), (16, 16), (8, 32))
    factors = [
        (
            torch.linalg.qr(torch.randn(block.rows, out))[0],
            torch.linalg.qr(torch.randn(block.cols, inner))[0],
        )
        for block, (out, inner) in zip(bindings.blocks, sides, strict=True)
    ]
    basis = KroneckerBasis(bindings.blocks, factors)
    x, y, ids = torch.randn(256, 784), torch.randint(10, (256,)), torch.arange(256)

    def step() -> None:
        optimizer.zero_grad()
        functional.cross_entropy(model(x), y).backward()
        optimizer.step()

    def recorded() -> None:
        recorder = Recorder(model, optimizer, bindings, basis)
        for _ in range(20):
            optimizer.zero_grad()
            with recorder.batch(ids) as batch:
                losses = functional.cross_entropy(model(x), y, reduction="none")
                batch.losses = losses.detach()
                losses.mean().backward()
            optimizer.step()
        recorder.take()
        recorder.close()

    def plain() -> None:
        for _ in range(20):
            step()

    seconds = by_turns({"plain": plain, "captured": recorded}, repeats, 5)
    ratios = [c / p for c, p in zip(seconds["captured"], seconds["plain"], strict=True)]
    print(
        f"capture, MLP 784-512-512-10, batch 256, {basis.size} numbers: {spread(ratios, 3)} times a plain step"
    )


class Chain(nn.Module):
    """`BLOCKS` linear layers of `WIDTH` squared numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(BLOCKS))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x).tanh() / 4
        return x


class Vectors:
    """Random vectors, to be mapped to their reverse."""

    def collate(self, samples: list[dict[str, Any]]) -> dict[str, Tensor]:
        """Reads raw float32 numbers."""
        return {
            "x": torch.stack(
                [torch.frombuffer(bytearray(s["bin"]), dtype=torch.float32) for s in samples]
            )
        }

    def losses(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """Squared error a sample."""
        x = batch["x"]
        error: Tensor = model(x) - x.flip(1)
        return error.square().mean(1)


def recursion(repeats: int, folder: str) -> None:
    """Embeddings from ledgers on disk to embeddings on disk, against the matrix products alone, in memory."""
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((BATCH * STEPS, WIDTH), np.float32)
    samples = [{"__key__": f"{i:06d}", "bin": row.tobytes()} for i, row in enumerate(vectors)]
    write_shards(f"{folder}/train-%06d.tar", samples, 1)
    data = {"shards": f"{folder}/train-000000.tar"}
    plan = Plan.model_validate(
        {
            "run": "speed", "root": folder, "data": data, "targets": {"same": data},
            "model": {"factory": "benchmarks.speed:Chain"}, "task": {"factory": "benchmarks.speed:Vectors"},
            "optimizer": {"kind": "sgd", "lr": 0.01}, "stages": [{"epochs": 1, "batch_size": BATCH}],
            "basis": {"kind": "kronecker", "method": "random", "rank": WIDTH},
        }
    )  # fmt: skip
    run = Run.start(plan)
    list_stage_samples.fn(run.url, 0)
    fit_basis.fn(run.url)
    train_stage.fn(run.url, 0)
    stage = run.folder.stage(0)
    segments = len(stage.segments())

    def embedded() -> None:
        if stage.embeddings.committed:
            stage.embeddings.remove()
        for number in range(segments):
            embed_segment.fn(run.url, 0, number)
        compose_stage.fn(run.url, 0)

    bare = _products()
    seconds = by_turns({"recursion": embedded, "products": bare}, repeats, 3)
    rates = {name: [BATCH * STEPS / s for s in found] for name, found in seconds.items()}
    shares = [r / p for r, p in zip(rates["recursion"], rates["products"], strict=True)]
    print(
        f"recursion, {BLOCKS} blocks of {WIDTH**2}, batch {BATCH}, {STEPS} steps in {segments} segments, disk to disk: "
        f"{spread(rates['recursion'], 0)} samples/s; its matrix products alone, in memory: "
        f"{spread(rates['products'], 0)}; share {spread(shares)}"
    )


def _products() -> Callable[[], None]:
    """Per step and block the two products of the recursion: `C A^T` and `E^T C`."""
    size = WIDTH**2
    c, k = torch.randn(BLOCKS, STEPS, BATCH, size), torch.randn(BLOCKS, size, size) / size

    def body() -> None:
        for block in range(BLOCKS):
            for step in range(STEPS):
                e = c[block, step] @ k[block].T
                torch.mm(e.T, c[block, step])

    return body


def query(repeats: int, folder: str) -> None:
    """The 100 largest inner products among 20,000 vectors of 6,144 numbers, against a bare FAISS flat scan."""
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((20_000, 6_144), np.float32)
    questions = rng.standard_normal((64, 6_144), np.float32)
    artefact = Output(Folder(f"{folder}/index"))
    with artefact.attempt("index", {}) as attempt:
        write_index(attempt, build_index([vectors], "flat", vectors.shape[1]))
    index, bare = read_index(artefact), faiss.IndexFlatIP(vectors.shape[1])
    bare.add(vectors)
    for count in (1, 64):
        asked = questions[:count]
        bodies: dict[str, Callable[[], object]] = {
            "ours": lambda asked=asked: search_index(index, asked, 100),
            "bare": lambda asked=asked: bare.search(asked, 100),
        }
        seconds = by_turns(bodies, repeats, 5)
        ratios = [o / b for o, b in zip(seconds["ours"], seconds["bare"], strict=True)]
        each = 1000 * statistics.median(seconds["ours"]) / count
        print(
            f"query, top 100 of 20,000 x 6,144, {count} at once: {spread(ratios)} times a bare flat scan, {each:.1f} ms each"
        )


def main() -> None:
    """Prints the three."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    faiss.omp_set_num_threads(options.threads)
    capture(options.repeats)
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
        recursion(options.repeats, folder)
        query(options.repeats, folder)


if __name__ == "__main__":
    main()

"""Speed of capture, recursion and query, each compared with its limit, in turns in one process.

`python -m benchmarks.speed [--repeats 5] [--threads 1]`
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.timing import format_spread, time_in_turns
from examples.shards import write_shards
from secateur.flows.pipeline_tasks import compose_embeddings, embed_part
from secateur.flows.stage import train_stage
from secateur.flows.workers import InlineWorkers
from secateur.influence.bindings import bind_layers
from secateur.influence.kronecker_basis import KroneckerBasis
from secateur.influence.recorder import Recorder
from secateur.storage.faiss_index import build_index, read_index, search_index, write_index
from secateur.storage.folder import Folder
from secateur.storage.outputs import Output
from secateur.tasks.plan import Plan
from secateur.tasks.run import Run

BLOCKS, WIDTH, BATCH, STEPS = 24, 16, 16, 200
CAPTURED_STEPS = 20


def measure_capture(repeats: int) -> None:
    """Compare a training step with captured contributions with the same step without."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10)
    )
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    bindings = bind_layers(model)
    basis = _random_basis(model)
    x, y, ids = torch.randn(256, 784), torch.randint(10, (256,)), torch.arange(256)

    def train_recorded() -> None:
        recorder = Recorder(model, optimizer, bindings, basis)
        for _ in range(CAPTURED_STEPS):
            optimizer.zero_grad()
            with recorder.batch(ids) as batch:
                losses = functional.cross_entropy(model(x), y, reduction="none")
                batch.losses = losses.detach()
                losses.mean().backward()
            optimizer.step()
        recorder.take_segment()
        recorder.close()

    def train_plain() -> None:
        for _ in range(CAPTURED_STEPS):
            optimizer.zero_grad()
            functional.cross_entropy(model(x), y).backward()
            optimizer.step()

    seconds = time_in_turns({"plain": train_plain, "captured": train_recorded}, repeats, 5)
    pairs = zip(seconds["captured"], seconds["plain"], strict=True)
    spread = format_spread([captured / plain for captured, plain in pairs], 3)
    what = f"MLP 784-512-512-10, batch 256, {basis.size} numbers"
    print(f"capture, {what}: {spread} times a plain step")


def _random_basis(model: nn.Module) -> KroneckerBasis:
    """A basis of random orthonormal factors, 256 coefficients per layer."""
    blocks = bind_layers(model).blocks
    sides = ((16, 16), (16, 16), (8, 32))
    factors = []
    for block, (rows, cols) in zip(blocks, sides, strict=True):
        left, _ = torch.linalg.qr(torch.randn(block.rows, rows))
        right, _ = torch.linalg.qr(torch.randn(block.cols, cols))
        factors.append((left, right))
    return KroneckerBasis(blocks, factors)


class Chain(nn.Module):
    """`BLOCKS` linear layers, each with the square of `WIDTH` parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(BLOCKS))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x).tanh() / 4
        return x


class Vectors:
    """Random vectors, which the model should map to their reverse."""

    def collate(self, samples: list[dict[str, Any]]) -> dict[str, Tensor]:
        """Read raw float32 numbers."""
        vectors = [torch.frombuffer(bytearray(s["bin"]), dtype=torch.float32) for s in samples]
        return {"x": torch.stack(vectors)}

    def losses(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """Return the squared error of each sample."""
        x = batch["x"]
        error: Tensor = model(x) - x.flip(1)
        return error.square().mean(1)


def measure_recursion(repeats: int, folder: str) -> None:
    """Compare embedding, from disk to disk, with the matrix products alone, in memory."""
    run = _train_chain(folder)
    stage = run.folder.stage(0)
    segments = len(stage.segments())

    def embed() -> None:
        if stage.embeddings.committed:
            stage.embeddings.remove()
        for number in range(segments):
            embed_part.run_without_prefect(run.url, 0, number)
        compose_embeddings.run_without_prefect(run.url, 0)

    seconds = time_in_turns({"recursion": embed, "products": _make_products()}, repeats, 3)
    rates = {name: [BATCH * STEPS / s for s in values] for name, values in seconds.items()}
    shares = [r / p for r, p in zip(rates["recursion"], rates["products"], strict=True)]
    print(
        f"recursion, {BLOCKS} blocks of {WIDTH**2}, batch {BATCH}, {STEPS} steps in {segments} "
        f"segments, disk to disk: {format_spread(rates['recursion'], 0)} samples/s; its matrix "
        f"products alone, in memory: {format_spread(rates['products'], 0)}; share "
        f"{format_spread(shares)}"
    )


def _train_chain(folder: str) -> Run:
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((BATCH * STEPS, WIDTH), np.float32)
    samples = [{"__key__": f"{i:06d}", "bin": row.tobytes()} for i, row in enumerate(vectors)]
    write_shards(f"{folder}/train-%06d.tar", samples, 1)
    data = {"shards": f"{folder}/train-000000.tar"}
    plan = Plan.model_validate(
        {
            "run": "speed",
            "root": folder,
            "data": data,
            "targets": {"same": data},
            "model": {"factory": "benchmarks.speed:Chain"},
            "task": {"factory": "benchmarks.speed:Vectors"},
            "optimizer": {"kind": "sgd", "lr": 0.01},
            "stages": [{"epochs": 1, "batch_size": BATCH}],
            "basis": {"kind": "kronecker", "method": "random", "rank": WIDTH},
        }
    )
    run = Run.start(plan)
    train_stage(InlineWorkers(), run.url, 0)
    return run


def _make_products() -> Callable[[], None]:
    """A function that computes the recursion's two products per step and block.

    They are `C A^T` and `E^T C`.
    """
    size = WIDTH**2
    contributions = torch.randn(BLOCKS, STEPS, BATCH, size)
    matrices = torch.randn(BLOCKS, size, size) / size

    def multiply() -> None:
        for block in range(BLOCKS):
            for step in range(STEPS):
                embeddings = contributions[block, step] @ matrices[block].T
                torch.mm(embeddings.T, contributions[block, step])

    return multiply


def measure_query(repeats: int, folder: str) -> None:
    """Compare a query with a bare FAISS flat scan.

    It finds the 100 largest inner products among 20,000 vectors of 6,144 numbers.
    """
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((20_000, 6_144), np.float32)
    questions = rng.standard_normal((64, 6_144), np.float32)
    output = Output(Folder(f"{folder}/index"))
    with output.attempt("index", {}) as attempt:
        write_index(attempt, build_index([vectors], "flat", vectors.shape[1]))
    index = read_index(output)
    bare = faiss.IndexFlatIP(vectors.shape[1])
    bare.add(vectors)
    for count in (1, 64):
        queries = questions[:count]
        functions: dict[str, Callable[[], object]] = {
            "ours": partial(search_index, index, queries, 100),
            "bare": partial(bare.search, queries, 100),
        }
        seconds = time_in_turns(functions, repeats, 5)
        ratios = [o / b for o, b in zip(seconds["ours"], seconds["bare"], strict=True)]
        each = 1000 * statistics.median(seconds["ours"]) / count
        print(
            f"query, top 100 of 20,000 x 6,144, {count} at once: {format_spread(ratios)} times a "
            f"bare flat scan, {each:.1f} ms each"
        )


def main() -> None:
    """Print the three comparisons."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    faiss.omp_set_num_threads(options.threads)
    measure_capture(options.repeats)
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
        measure_recursion(options.repeats, folder)
        measure_query(options.repeats, folder)


if __name__ == "__main__":
    main()

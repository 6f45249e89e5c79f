"""Compare the memory that `secateur plan` foretells with what the parts of a run take.

Every part runs in a process of its own. Its peak is the largest resident set of the process, less
the one after the imports (Linux only). If several processes train, it is that of the first.
`python -m benchmarks.memory [WORKLOAD ...] [--repeats 3]` prints one table per workload.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faiss  # noqa: F401  # imported before the first measurement, like all libraries
import torch
import torch.distributed as dist
import yaml
from rich.table import Table
from torch import nn

from benchmarks.language_models import write_tokens
from benchmarks.resident_set import MEBIBYTE, measure_growth, run_apart
from benchmarks.timing import format_spread
from examples.images.make_shards import make
from secateur.flows.tables import print_table
from secateur.influence.process_group import Ranks, current_ranks
from secateur.tasks.data.samples import list_stage_samples, read_stage_samples
from secateur.tasks.plan import Plan
from secateur.tasks.plan.plan_file import read_plan
from secateur.tasks.reporting.dry_run import estimate_run
from secateur.tasks.run import Run
from secateur.tasks.training.fit_basis import fit_basis
from secateur.tasks.training.train import train_segments
from secateur.tasks.valuation.embed import compose_stage, embed_part
from secateur.tasks.valuation.index import index_stage
from secateur.tasks.valuation.replay import replay_stage
from secateur.tasks.valuation.score import write_scores
from secateur.tasks.valuation.target_gradients import write_target_gradients

LANGUAGE: dict[str, Any] = {
    "root": "runs",
    "threads": 1,
    "task": {"factory": "benchmarks.language_models:Tokens"},
    "optimizer": {"kind": "adamw", "lr": 1e-3},
    "stages": [{"steps": 4, "batch_size": 8}],
    "segment_steps": 2,
    "basis": {"kind": "coordinates", "fit_steps": 2},
    "score": {"horizon": "stage", "aggregate": "mean"},
}


def image_plan(folder: Path) -> dict[str, Any]:
    """Return the plan of the image example, with its shards in a folder."""
    make(str(folder), 0)
    plan: dict[str, Any] = yaml.safe_load(Path("examples/images/plan.yaml").read_text())
    text = yaml.safe_dump(plan | {"threads": 1}).replace("data/images", str(folder))
    loaded: dict[str, Any] = yaml.safe_load(text)
    return loaded


def language_plan(folder: Path, model: str, vocabulary: int) -> dict[str, Any]:
    """Return the plan of a language model, with random tokens in a folder."""
    write_tokens(folder, vocabulary, 200)
    return {
        **LANGUAGE,
        "run": model,
        "model": {"factory": f"benchmarks.language_models:{model}"},
        "data": {"shards": f"{folder}/train-000000.tar"},
        "targets": {"target": {"shards": f"{folder}/target-000000.tar"}},
    }


def launched_plan(folder: Path, shard: str) -> dict[str, Any]:
    """Return the plan of the Llama, trained by two processes."""
    launch = {"processes": 2, "shard": shard}
    return {**language_plan(folder, "llama", 32_000), "launch": launch}


WORKLOADS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "image example": image_plan,
    "Llama 4 x 256": lambda folder: language_plan(folder, "llama", 32_000),
    "Pythia-14M": lambda folder: language_plan(folder, "pythia", 50_304),
    "Llama, DDP": lambda folder: launched_plan(folder, "none"),
    "Llama, FSDP2": lambda folder: launched_plan(folder, "fsdp"),
}


def train(run: Run, ranks: Ranks) -> None:
    """Train the first stage, in one process or in this one of several."""
    train_segments(run, 0, read_stage_samples(run, 0), ranks, run.plan.launch.shard)


def compose_and_index(run: Run) -> None:
    """Compose the stage's embeddings, and index them."""
    compose_stage(run, 0)
    index_stage(run, 0)


def embed(run: Run) -> None:
    """Embed every segment."""
    for number in range(len(run.folder.stage(0).segments())):
        embed_part(run, 0, number)


PARTS: dict[str, Callable[[Run, Ranks], object]] = {
    "fit of the basis": lambda run, _: fit_basis(run),
    "training": train,
    "embedding": lambda run, _: embed(run),
    "composing and index": lambda run, _: compose_and_index(run),
    "targets": lambda run, _: write_target_gradients(run, 0),
    "replay": lambda run, _: replay_stage(run, 0),
    "scoring": lambda run, _: write_scores(run, 0),
}


def main(names: list[str], repeats: int) -> None:
    """Measure some workloads."""
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            values = WORKLOADS[name](Path(folder))
            print_table(compare(name, values, Path(folder), repeats))


def compare(name: str, values: dict[str, Any], folder: Path, repeats: int) -> Table:
    """Return the table of a workload: each part as foretold and as measured.

    Args:
        values: of the plan.
        folder: where the plans and runs are written.
        repeats: how often the whole run is measured.
    """
    paths = [folder / f"plan-{number}.yaml" for number in range(repeats)]
    for number, path in enumerate(paths):
        path.write_text(yaml.safe_dump(values | {"root": f"{folder}/runs-{number}"}))
    started = time.perf_counter()
    estimate = estimate_run(read_plan(paths[0]))
    seconds = time.perf_counter() - started
    runs = [_measure_run(path) for path in paths]
    foretold = {part.part: part.peak / MEBIBYTE for part in estimate.memory}
    measured = {part: [run[part] for run in runs if part in run] for part in foretold}
    rows = {part: (foretold[part], peaks) for part, peaks in measured.items() if peaks}
    largest = [max(peaks) for peaks in zip(*(peaks for _, peaks in rows.values()), strict=True)]
    rows["the largest part"] = (max(foretold for foretold, _ in rows.values()), largest)
    table = Table("part", "foretold MiB", "measured MiB", "foretold / measured")
    for part, (value, peaks) in rows.items():
        ratios = [value / peak for peak in peaks]
        table.add_row(part, f"{value:.1f}", format_spread(peaks, 1), format_spread(ratios))
    table.title = f"{name}: {estimate.parameters:,} parameters, foretold in {seconds:.1f} s"
    return table


def _measure_run(path: Path) -> dict[str, float]:
    """Return the peak of each part of a new run, in MiB."""
    plan = read_plan(path)
    list_stage_samples(Run.start(plan), 0)
    arguments = ["--plan", str(path), "--part"]
    if plan.launch.processes == 1:
        return {part: run_apart("benchmarks.memory", *arguments, part) for part in PARTS}
    launcher = ["--nproc-per-node", str(plan.launch.processes), "-m", "benchmarks.memory"]
    return {
        "fit of the basis": run_apart("benchmarks.memory", *arguments, "fit of the basis"),
        "training": run_apart("torch.distributed.run", *launcher, *arguments, "training"),
    }


def run_part(plan: Plan, part: str) -> None:
    """Run a part of a run, and print how far the resident set grew, in MiB."""
    run = Run.start(plan)
    ranks = Ranks()
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
        ranks = current_ranks()
        ranks.sum(torch.zeros(1))  # loads what exchanges tensors
        from torch.distributed import fsdp  # noqa: F401
    warm_up(run)
    growth = measure_growth(lambda: PARTS[part](run, ranks))
    if ranks.is_first:
        print(growth, flush=True)
    if ranks.size > 1:
        dist.destroy_process_group()


def warm_up(run: Run) -> None:
    """Load what any training loads: kernels, threads, and the modules behind the factories."""
    run.task().collate(read_stage_samples(run, 0).read([0]))
    if run.plan.model.factory.startswith("benchmarks.language_models"):
        import transformers.models.gpt_neox.modeling_gpt_neox
        import transformers.models.llama.modeling_llama  # noqa: F401
    layer = nn.Linear(64, 64)
    optimizer = torch.optim.AdamW(layer.parameters())
    layer(torch.randn(64, 64)).square().mean().backward()
    optimizer.step()
    torch.linalg.eigh(torch.eye(64, dtype=torch.float64))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("workloads", nargs="*", help=f"some of {', '.join(WORKLOADS)}")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--plan", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--part", choices=list(PARTS), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.part:
        run_part(read_plan(arguments.plan), arguments.part)
    else:
        main(arguments.workloads or list(WORKLOADS), arguments.repeats)

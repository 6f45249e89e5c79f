"""Compare the memory that `secateur plan` foretells with what the parts of a run take.

Every part runs in a process of its own. Its peak is the largest resident set of the process, less
the one after the imports (Linux only). `python -m benchmarks.memory` prints one table per workload.
"""

from __future__ import annotations

import argparse
import gc
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faiss  # noqa: F401  # imported before the first measurement, like all libraries
import torch
import yaml
from rich.table import Table
from torch import nn

from benchmarks.language_models import write_tokens
from examples.images.make_shards import make
from secateur.flows.tables import print_table
from secateur.tasks.data.samples import list_stage_samples, read_stage_samples
from secateur.tasks.plan import Plan
from secateur.tasks.plan.plan_file import read_plan
from secateur.tasks.reporting.dry_run import estimate_run
from secateur.tasks.run import Run
from secateur.tasks.training.fit_basis import fit_basis
from secateur.tasks.training.train import train_stage
from secateur.tasks.valuation.embed import compose_stage, embed_part
from secateur.tasks.valuation.index import index_stage
from secateur.tasks.valuation.replay import replay_stage
from secateur.tasks.valuation.score import write_scores
from secateur.tasks.valuation.target_gradients import write_target_gradients

MEBIBYTE = 1 << 20
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


WORKLOADS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "image example": image_plan,
    "Llama 4 x 256": lambda folder: language_plan(folder, "llama", 32_000),
    "Pythia-14M": lambda folder: language_plan(folder, "pythia", 50_304),
}


def compose_and_index(run: Run) -> None:
    """Compose the stage's embeddings, and index them."""
    compose_stage(run, 0)
    index_stage(run, 0)


def embed(run: Run) -> None:
    """Embed every segment."""
    for number in range(len(run.folder.stage(0).segments())):
        embed_part(run, 0, number)


PARTS: dict[str, Callable[[Run], object]] = {
    "fit of the basis": fit_basis,
    "training": lambda run: train_stage(run, 0),
    "embedding": embed,
    "composing and index": compose_and_index,
    "targets": lambda run: write_target_gradients(run, 0),
    "replay": lambda run: replay_stage(run, 0),
    "scoring": lambda run: write_scores(run, 0),
}


def main() -> None:
    """Measure every workload."""
    for name, make_plan in WORKLOADS.items():
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "plan.yaml"
            values = make_plan(Path(folder)) | {"root": f"{folder}/runs"}
            path.write_text(yaml.safe_dump(values))
            print_table(compare(name, path))


def compare(name: str, path: Path) -> Table:
    """Return the table of a workload: each part as foretold and as measured."""
    plan = read_plan(path)
    started = time.perf_counter()
    estimate = estimate_run(plan)
    seconds = time.perf_counter() - started
    list_stage_samples(Run.start(plan), 0)
    table = Table("part", "foretold MiB", "measured MiB", "foretold / measured")
    foretold = {part.part: part.peak / MEBIBYTE for part in estimate.memory}
    measured = {part: measure_apart(path, part) for part in PARTS}
    rows = list(foretold)
    for part in rows:
        table.add_row(part, *_cells(foretold[part], measured[part]))
    largest = _cells(max(foretold.values()), max(measured[part] for part in rows))
    table.add_row("the whole run", *largest)
    table.title = f"{name}: {estimate.parameters:,} parameters, foretold in {seconds:.1f} s"
    return table


def _cells(foretold: float, measured: float) -> tuple[str, str, str]:
    return f"{foretold:.1f}", f"{measured:.1f}", f"{foretold / measured:.2f}"


def measure_apart(path: Path, part: str) -> float:
    """Run a part in a process of its own, and return its peak in MiB."""
    command = [sys.executable, "-m", "benchmarks.memory", "--plan", str(path), "--part", part]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(done.stdout.splitlines()[-1])


def run_part(plan: Plan, part: str) -> None:
    """Run a part of a run, and print how far the resident set grew, in MiB."""
    run = Run.start(plan)
    warm_up(run)
    gc.collect()
    forget_peak()
    before = resident_set("VmRSS")
    PARTS[part](run)
    print((resident_set("VmHWM") - before) / MEBIBYTE)


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


def forget_peak() -> None:
    """Let the kernel count this process's peak anew, without that of the imports."""
    Path("/proc/self/clear_refs").write_text("5")


def resident_set(name: str) -> int:
    """Return the size of this process's memory (`VmRSS`) or its peak (`VmHWM`) in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--plan", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--part", choices=list(PARTS), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.part:
        run_part(read_plan(arguments.plan), arguments.part)
    else:
        main()

"""Online selection: in all steps, in an early and a late window, in either alone, never, and at random; loss and time.

`python -m benchmarks.selection [--seeds 5] [--workloads images-constant ...] [--keep FOLDER] [--figure FILE]`. Every arm of a seed
trains the same model from the same start for as many steps of the same size, and records every step; arms differ in the steps in
which they choose among three candidates for each place. Candidates are judged by one target, arms by another that no arm
sees. Time is that of the process on one thread, arms by turns, as a ratio to `never`. With `--keep`, finished seeds are kept
in a folder and not run again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks import wrong_digits as digits
from benchmarks.timing import spread
from examples.images import make_shards as images
from examples.text import make_shards as text
from secateur.tasks.data.samples import list_stage_samples, list_target_samples
from secateur.tasks.plan import Plan
from secateur.tasks.plan.plan_file import read_plan
from secateur.tasks.run.run import Run
from secateur.tasks.training.fit_basis import fit_basis
from secateur.tasks.training.train import train_stage
from secateur.tasks.valuation.target_gradients import loop_at_stage_end, target_loss

EARLY, LATE, WHOLE = (0.0, 0.2), (0.7, 1.0), (0.0, 1.0)
CANDIDATES, JUDGES = 3, 64
COSINE = {"kind": "cosine", "warmup": 0.1}
Stretches = list[tuple[float, float]]

ARMS: dict[str, tuple[str, Stretches]] = {
    "never": ("greats", []),
    "always": ("greats", [WHOLE]),
    "early and late": ("greats", [EARLY, LATE]),
    "early": ("greats", [EARLY]),
    "late": ("greats", [LATE]),
    "always, grad_align": ("grad_align", [WHOLE]),
    "always, random": ("random", [WHOLE]),
}


@dataclass(frozen=True)
class Workload:
    """An example's plan and data, with a schedule and a number of steps of its own."""

    plan: str
    make: Callable[[str, int], None]
    scoring: str
    steps: int
    schedule: dict[str, Any]
    model: dict[str, Any] = field(default_factory=dict)


WORKLOADS = {
    "digits-constant": Workload(
        "benchmarks/wrong_digits.yaml", digits.make, "clean", 240, {"kind": "constant"}
    ),
    "digits-cosine": Workload("benchmarks/wrong_digits.yaml", digits.make, "clean", 240, COSINE),
    "images-constant": Workload(
        "examples/images/plan.yaml", images.make, "clean", 320, {"kind": "constant"}
    ),
    "images-cosine": Workload("examples/images/plan.yaml", images.make, "clean", 320, COSINE),
    "text-cosine": Workload(
        "examples/text/plan.yaml", text.make, "manual", 100, COSINE, {"layers": 1, "width": 32}
    ),
}


@dataclass(frozen=True)
class Outcome:
    """Loss on the judging target at the end, and seconds that training took."""

    loss: float
    seconds: float


def main() -> None:
    """Prints a table a workload, and draws them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--keep", type=Path)
    parser.add_argument("--figure")
    asked = parser.parse_args()
    found = {name: measured(name, range(asked.seeds), asked.keep) for name in asked.workloads}
    for name, arms in found.items():
        show(name, arms)
    if asked.figure:
        Path(asked.figure).parent.mkdir(parents=True, exist_ok=True)
        draw(found, asked.figure)


def measured(name: str, seeds: range, keep: Path | None) -> dict[str, list[Outcome]]:
    """What each arm of a workload came to, one outcome a seed."""
    found: dict[str, list[Outcome]] = {arm: [] for arm in ARMS}
    for seed in seeds:
        file = keep / f"{name}-{seed}.json" if keep else None
        if file and file.exists():
            outcomes = {arm: Outcome(**held) for arm, held in json.loads(file.read_text()).items()}
        else:
            outcomes = of_seed(WORKLOADS[name], seed)
        if file:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps({arm: asdict(outcome) for arm, outcome in outcomes.items()}))
        for arm, outcome in outcomes.items():
            found[arm].append(outcome)
    return found


def of_seed(workload: Workload, seed: int) -> dict[str, Outcome]:
    """Trains each arm once."""
    with tempfile.TemporaryDirectory() as root:
        workload.make(f"{root}/data", seed)
        return {arm: outcome(plan_of(workload, arm, seed, root)) for arm in ARMS}


def plan_of(workload: Workload, arm: str, seed: int, root: str) -> Plan:
    """The example's plan as one stage, with the arm's windows; every step is recorded in each arm."""
    method, stretches = ARMS[arm]
    select = {
        "method": method,
        "candidates": CANDIDATES,
        "samples": JUDGES,
        "target": workload.scoring,
    }
    edges = sorted({0.0, 1.0, *(edge for stretch in stretches for edge in stretch)})
    windows = [
        {"start": a, "stop": b} | ({"select": select} if (a, b) in stretches else {})
        for a, b in pairwise(edges)
    ]
    targets = {
        workload.scoring: f"{root}/data/target-000000.tar",
        "test": f"{root}/data/test-000000.tar",
    }
    changes: dict[str, Any] = {
        "run": arm.replace(", ", "-").replace(" ", "-"), "root": root, "seed": seed, "threads": 1, "audit": None,
        "data": {"shards": f"{root}/data/train-{{000000..000003}}.tar"}, "schedule": workload.schedule,
        "targets": {name: {"shards": shards} for name, shards in targets.items()},
        "stages": [{"steps": workload.steps, "batch_size": 32, "windows": windows}],
    }  # fmt: skip
    plan = read_plan(workload.plan, changes)
    model = plan.model.model_copy(update={"args": plan.model.args | workload.model})
    return plan.model_copy(update={"model": model})


def outcome(plan: Plan) -> Outcome:
    """Trains an arm."""
    run = Run.start(plan)
    list_stage_samples.fn(run.url, 0)
    fit_basis.fn(run.url)
    start = time.process_time()
    train_stage.fn(run.url, 0)
    seconds = time.process_time() - start
    judging = list_target_samples(run, "test")
    return Outcome(
        target_loss(loop_at_stage_end(run, 0), judging, torch.arange(len(judging))), seconds
    )


def show(workload: str, arms: dict[str, list[Outcome]]) -> None:
    """The table of a workload."""
    pairs = list(zip(arms["never"], arms["always"], strict=True))
    print(f"{workload}, {len(pairs)} seeds: median (least to greatest)")
    print(
        f"  {'arm':28}{'loss':26}{'share of the gain kept':28}{'time, of never':26}share of the overhead"
    )
    for arm, outcomes in arms.items():
        triples = [
            (never, always, own) for (never, always), own in zip(pairs, outcomes, strict=True)
        ]
        kept = [(n.loss - own.loss) / (n.loss - a.loss) for n, a, own in triples]
        ratio = [own.seconds / n.seconds for n, _, own in triples]
        overhead = [(own.seconds - n.seconds) / (a.seconds - n.seconds) for n, a, own in triples]
        figures = (
            spread([o.loss for o in outcomes], 3),
            spread(kept),
            spread(ratio),
            spread(overhead),
        )
        print(f"  {arm:28}{figures[0]:26}{figures[1]:28}{figures[2]:26}{figures[3]}")
    trained = 1 / (CANDIDATES + JUDGES / 32)  # samples trained on for each one that is judged
    judged = [(a.seconds - n.seconds) / n.seconds * trained for n, a in pairs]
    print(f"  judging a sample costs {spread(judged)} of training on one")


def draw(found: dict[str, dict[str, list[Outcome]]], path: str) -> None:
    """Each arm's loss and time, median with least and greatest, a row a workload."""
    figure = Figure(figsize=(9, 2.4 * len(found)), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(found), 2, squeeze=False)
    for (loss, ratio), (name, arms) in zip(grid, found.items(), strict=True):
        never = [outcome.seconds for outcome in arms["never"]]
        times = {
            arm: [o.seconds / n for o, n in zip(os, never, strict=True)] for arm, os in arms.items()
        }
        losses = {arm: [outcome.loss for outcome in outcomes] for arm, outcomes in arms.items()}
        for axes, values, label in (
            (loss, losses, "loss on the judging target"),
            (ratio, times, "time, of never"),
        ):
            for place, (arm, own) in enumerate(values.items()):
                colour = {"never": "0.4", "always": "tab:red"}.get(arm, "tab:blue")
                axes.plot([min(own), max(own)], [place, place], color=colour, linewidth=2)
                axes.plot(statistics.median(own), place, "o", color=colour)
            axes.set_yticks(
                range(len(values)), list(values) if axes is loss else [""] * len(values), fontsize=7
            )
            axes.invert_yaxis()
            axes.set_xlabel(label, fontsize=8)
            axes.tick_params(axis="x", labelsize=7)
        loss.set_title(name, fontsize=9, loc="left")
    figure.savefig(path, dpi=110, metadata={"Software": None})


if __name__ == "__main__":
    main()

"""Loss and time of online selection.

It selects in all steps, in an early and a late window, in only one of them, never, and at random.

    python -m benchmarks.selection [--seeds 5] [--workloads images-constant ...] [--keep FOLDER]
        [--figure FILE]

Every arm of a seed trains the same model from the same start for the same number of steps of the
same size, and records every step. Arms differ in the steps in which they choose among three
candidates for each place of the batch. One target scores candidates; another one, which no arm
sees, evaluates the arms. Time is that of the process on one thread, as a ratio to `never`. With
`--keep`, finished seeds are kept in a folder and are not run again.
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
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks import wrong_digits as digits
from benchmarks.timing import format_spread
from examples.images import make_shards as images
from examples.text import make_shards as text
from secateur.flows.pipeline_tasks import fit_basis, list_samples, train
from secateur.tasks.data.samples import list_target_samples
from secateur.tasks.plan import Plan
from secateur.tasks.plan.plan_file import read_plan
from secateur.tasks.run import Run
from secateur.tasks.valuation.target_gradients import loop_at_stage_end, target_loss

EARLY, LATE, WHOLE = (0.0, 0.2), (0.7, 1.0), (0.0, 1.0)
CANDIDATES, TARGET_SAMPLES = 3, 64
COSINE = {"kind": "cosine", "warmup": 0.1}
Windows = list[tuple[float, float]]

ARMS: dict[str, tuple[str, Windows]] = {
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
    """The plan and data of an example, with another schedule and number of steps."""

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
    """The loss on the evaluating target at the end, and the seconds that training took."""

    loss: float
    seconds: float


def main() -> None:
    """Print a table per workload, and draw them if a file is named."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--keep", type=Path, help="folder of finished seeds")
    parser.add_argument("--figure", help="file to draw to")
    options = parser.parse_args()
    seeds = range(options.seeds)
    results = {name: measure(name, seeds, options.keep) for name in options.workloads}
    for name, arms in results.items():
        print_table(name, arms)
    if options.figure:
        Path(options.figure).parent.mkdir(parents=True, exist_ok=True)
        draw(results, options.figure)


def measure(name: str, seeds: range, keep: Path | None) -> dict[str, list[Outcome]]:
    """Return each arm's outcomes on a workload, one per seed."""
    results: dict[str, list[Outcome]] = {arm: [] for arm in ARMS}
    for seed in seeds:
        file = keep / f"{name}-{seed}.json" if keep else None
        if file and file.exists():
            stored = json.loads(file.read_text())
            outcomes = {arm: Outcome(**values) for arm, values in stored.items()}
        else:
            outcomes = train_arms(WORKLOADS[name], seed)
        if file:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps({arm: asdict(outcome) for arm, outcome in outcomes.items()}))
        for arm, outcome in outcomes.items():
            results[arm].append(outcome)
    return results


def train_arms(workload: Workload, seed: int) -> dict[str, Outcome]:
    """Train each arm once."""
    with tempfile.TemporaryDirectory() as root:
        workload.make(f"{root}/data", seed)
        return {arm: train_arm(make_plan(workload, arm, seed, root)) for arm in ARMS}


def make_plan(workload: Workload, arm: str, seed: int, root: str) -> Plan:
    """Return the example's plan as one stage with the arm's windows.

    Every step is recorded in each arm.
    """
    targets = {
        workload.scoring: f"{root}/data/target-000000.tar",
        "test": f"{root}/data/test-000000.tar",
    }
    windows = make_windows(workload, arm)
    changes: dict[str, Any] = {
        "run": arm.replace(", ", "-").replace(" ", "-"),
        "root": root,
        "seed": seed,
        "threads": 1,
        "audit": None,
        "data": {"shards": f"{root}/data/train-{{000000..000003}}.tar"},
        "schedule": workload.schedule,
        "targets": {name: {"shards": shards} for name, shards in targets.items()},
        "stages": [{"steps": workload.steps, "batch_size": 32, "windows": windows}],
    }
    plan = read_plan(workload.plan, changes)
    model = plan.model.model_copy(update={"args": plan.model.args | workload.model})
    return plan.model_copy(update={"model": model})


def make_windows(workload: Workload, arm: str) -> list[dict[str, Any]]:
    """Return windows that cover the stage, some of which select."""
    method, selecting = ARMS[arm]
    select = {
        "method": method,
        "candidates": CANDIDATES,
        "samples": TARGET_SAMPLES,
        "target": workload.scoring,
    }
    edges = sorted({0.0, 1.0, *(edge for window in selecting for edge in window)})
    windows = []
    for start, stop in pairwise(edges):
        window: dict[str, Any] = {"start": start, "stop": stop}
        if (start, stop) in selecting:
            window["select"] = select
        windows.append(window)
    return windows


def train_arm(plan: Plan) -> Outcome:
    """Train an arm, and evaluate it."""
    run = Run.start(plan)
    list_samples.run_without_prefect(run.url, 0)
    fit_basis.run_without_prefect(run.url)
    start = time.process_time()
    train.run_without_prefect(run.url, 0)
    seconds = time.process_time() - start
    samples = list_target_samples(run, "test")
    loss = target_loss(loop_at_stage_end(run, 0), samples, torch.arange(len(samples)))
    return Outcome(loss, seconds)


def print_table(workload: str, arms: dict[str, list[Outcome]]) -> None:
    """Print the table of a workload."""
    pairs = list(zip(arms["never"], arms["always"], strict=True))
    print(f"{workload}, {len(pairs)} seeds: median (least to greatest)")
    columns = f"{'loss':26}{'share of the gain kept':28}{'time, of never':26}share of the overhead"
    print(f"  {'arm':28}{columns}")
    for arm, outcomes in arms.items():
        gains, ratios, overheads = [], [], []
        for (never, always), own in zip(pairs, outcomes, strict=True):
            gains.append((never.loss - own.loss) / (never.loss - always.loss))
            ratios.append(own.seconds / never.seconds)
            overheads.append((own.seconds - never.seconds) / (always.seconds - never.seconds))
        loss = format_spread([outcome.loss for outcome in outcomes], 3)
        gain, ratio, overhead = (format_spread(v) for v in (gains, ratios, overheads))
        print(f"  {arm:28}{loss:26}{gain:28}{ratio:26}{overhead}")
    # Samples trained on, for each one that is scored.
    trained = 1 / (CANDIDATES + TARGET_SAMPLES / 32)
    costs = [(a.seconds - n.seconds) / n.seconds * trained for n, a in pairs]
    print(f"  judging a sample costs {format_spread(costs)} of training on one")


def draw(results: dict[str, dict[str, list[Outcome]]], path: str) -> None:
    """Draw each arm's loss and time, median with least and greatest, in one row per workload."""
    figure = Figure(figsize=(9, 2.4 * len(results)), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(results), 2, squeeze=False)
    for (left, right), (name, arms) in zip(grid, results.items(), strict=True):
        never = [outcome.seconds for outcome in arms["never"]]
        losses, ratios = {}, {}
        for arm, outcomes in arms.items():
            losses[arm] = [outcome.loss for outcome in outcomes]
            pairs = zip(outcomes, never, strict=True)
            ratios[arm] = [outcome.seconds / seconds for outcome, seconds in pairs]
        _draw_arms(left, losses, "loss on the judging target", list(arms))
        _draw_arms(right, ratios, "time, of never", [""] * len(arms))
        left.set_title(name, fontsize=9, loc="left")
    figure.savefig(path, dpi=110, metadata={"Software": None})


def _draw_arms(axes: Axes, values: dict[str, list[float]], label: str, names: list[str]) -> None:
    for place, (arm, own) in enumerate(values.items()):
        color = {"never": "0.4", "always": "tab:red"}.get(arm, "tab:blue")
        axes.plot([min(own), max(own)], [place, place], color=color, linewidth=2)
        axes.plot(statistics.median(own), place, "o", color=color)
    axes.set_yticks(range(len(values)), names, fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel(label, fontsize=8)
    axes.tick_params(axis="x", labelsize=7)


if __name__ == "__main__":
    main()

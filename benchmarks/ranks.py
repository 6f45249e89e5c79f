"""Training in two processes against one, and kills of one of them at random moments.

    python -m benchmarks.ranks [--kills 10] [--device cpu]

The first stage of the image example is trained, scored and pruned in float32: in one process, in
two with DDP, and in two with FSDP2, for SGD and for AdamW. The distance of two ledgers is the
largest distance of two of their tensors, relative to the norm of the tensor. The limit is what
rounding alone does: one process, with the samples of each step in another order.

Then DDP runs are killed: -9 at a random moment for one of the two processes. The run is resumed
with two processes, one or three, with DDP or FSDP2, in turns, and compared with an uninterrupted
run of two: records lost, records that occur twice, and decisions that differ.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import yaml
from torch import Tensor

from examples.images.make_shards import make
from secateur.errors import SecateurError
from secateur.flows.stage import prune_stage, score_stage, train_stage
from secateur.flows.workers import InlineWorkers
from secateur.storage.ledger import read_ledger
from secateur.tasks.data.batches import BatchSchedule
from secateur.tasks.plan import LaunchConfig, Plan
from secateur.tasks.results.pruning_results import read_decisions
from secateur.tasks.run import Run
from tests.tasks.ranks import find_processes, kill_a_process, ledger_distance

SEED = 14
ORDERS = 5  # of the samples of a step
INLINE = InlineWorkers()
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "SGD": {"kind": "sgd", "lr": 0.1, "momentum": 0.9, "clip_norm": 1.0},
    "AdamW": {"kind": "adamw", "lr": 0.001, "clip_norm": 1.0},
}
BASES: dict[str, dict[str, Any]] = {
    "SGD": {"kind": "kronecker", "rank": 16},
    "AdamW": {"kind": "coordinates", "numbers": 256},
}
RESUMED_WITH = [
    LaunchConfig(processes=2),
    LaunchConfig(),
    LaunchConfig(processes=2, shard="fsdp"),
    LaunchConfig(processes=3),
]
Record = tuple[int, int]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--device", default="cpu", help="`cpu` (gloo) or `cuda` (NCCL)")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory(prefix="ranks-") as name:
        folder = Path(name)
        make(str(folder / "data"), 0)
        print(f"torch {torch.__version__}, {options.device}, float32, seed {SEED}", flush=True)
        for optimizer in OPTIMIZERS:
            _compare(folder, optimizer, options.device)
        if options.kills:
            _kill(folder, options.kills, options.device)


def _compare(folder: Path, optimizer: str, device: str) -> None:
    one, seconds = _finish(_plan(folder, "one", optimizer, LaunchConfig(), device))
    print(f"{optimizer}, one process: {seconds:.1f} s to train", flush=True)
    _compare_orders(folder, one, optimizer, device)
    for shard in ("none", "fsdp"):
        launch = LaunchConfig(processes=2, shard=shard)
        two, seconds = _finish(_plan(folder, shard, optimizer, launch, device))
        differing = _differing_decisions(one, two)
        print(
            f"{optimizer}, two processes, {'FSDP2' if shard == 'fsdp' else 'DDP'}: "
            f"{seconds:.1f} s to start and train, ledgers {ledger_distance(one, two, first=1):.1e} "
            f"apart in the first segment and {ledger_distance(one, two):.1e} in any, "
            f"{differing} of {len(read_decisions(one, 0))} decisions differ",
            flush=True,
        )


def _compare_orders(folder: Path, one: Run, optimizer: str, device: str) -> None:
    """Print how far apart runs of one process are that differ in the order within each step."""
    batch = BatchSchedule.batch
    first, whole, differing = [], [], []
    for number in range(ORDERS):

        def reordered(schedule: BatchSchedule, step: int, number: int = number) -> Tensor:
            rows = batch(schedule, step)
            generator = torch.Generator().manual_seed(step * ORDERS + number)
            return rows[torch.randperm(len(rows), generator=generator)]

        with patch.object(BatchSchedule, "batch", reordered):
            plan = _plan(folder, f"order-{number}", optimizer, LaunchConfig(), device)
            other, _ = _finish(plan)
        first.append(ledger_distance(one, other, first=1, in_order=False))
        whole.append(ledger_distance(one, other, in_order=False))
        differing.append(_differing_decisions(one, other))
    print(
        f"{optimizer}, one process, samples of each step in {ORDERS} other orders: ledgers "
        f"{min(first):.1e} to {max(first):.1e} apart in the first segment and {min(whole):.1e} to "
        f"{max(whole):.1e} in any, at most {max(differing)} decisions differ",
        flush=True,
    )


def _kill(folder: Path, count: int, device: str) -> None:
    launch = LaunchConfig(processes=2)
    whole = Run.open(f"{folder}/runs/none-AdamW")
    expected = _records(whole)
    rng = random.Random(SEED)
    segments = len(whole.folder.stage(0).segments())
    totals = dict.fromkeys(("lost", "duplicated", "differing decisions", "left processes"), 0)
    for number in range(count):
        plan = _plan(folder, f"killed-{number}", "AdamW", launch, device)
        run = Run.start(plan)
        place, rank = rng.uniform(0, segments - 1), rng.randrange(2)
        # A segment takes about 0.2 seconds.
        killer = kill_a_process(run, int(place), 0.2 * (place - int(place)), rank)
        ended = "trained to its end before it was killed"
        try:
            train_stage(INLINE, run.url, 0)
        except SecateurError as error:
            ended = str(error).split(";")[0].replace(f" of {run.url}", "")
        killer.join()
        left = len(find_processes(run))
        committed = len(run.folder.stage(0).segments())
        resumed = RESUMED_WITH[number % len(RESUMED_WITH)]
        run, _ = _finish(plan.model_copy(update={"launch": resumed}), resumed)
        records = _records(run)
        found = {
            "lost": len(set(expected) - set(records)),
            "duplicated": len(records) - len(set(records)),
            "differing decisions": _differing_decisions(whole, run),
            "left processes": left,
        }
        totals = {name: totals[name] + found[name] for name in totals}
        print(
            f"  {ended}; {committed} of {segments} segments committed; resumed with "
            f"{resumed.processes} ({resumed.shard}): {_format(found)}, ledgers "
            f"{ledger_distance(whole, run):.1e} apart",
            flush=True,
        )
    print(f"{count} kills: {_format(totals)}", flush=True)


def _finish(plan: Plan, launch: LaunchConfig | None = None) -> tuple[Run, float]:
    """Train, score and prune the first stage, and return the seconds that training took."""
    run = Run.start(plan)
    start = time.monotonic()
    train_stage(INLINE, run.url, 0, launch)
    seconds = time.monotonic() - start
    score_stage(INLINE, run.url, 0)
    prune_stage(INLINE, run.url, 0)
    return run, seconds


def _records(run: Run) -> list[Record]:
    """Every use of a sample in the ledger, as its step and its row."""
    records: list[Record] = []
    for segment in run.folder.stage(0).segments():
        ledger, _ = read_ledger(segment)
        pairs = zip(ledger["steps"].tolist(), ledger["samples"].tolist(), strict=True)
        records += pairs
    return records


def _differing_decisions(one: Run, other: Run) -> int:
    kept, other_kept = read_decisions(one, 0)["keep"], read_decisions(other, 0)["keep"]
    return int((kept != other_kept).sum())


def _plan(folder: Path, name: str, optimizer: str, launch: LaunchConfig, device: str) -> Plan:
    plan: dict[str, Any] = yaml.safe_load(Path("examples/images/plan.yaml").read_text())
    plan |= {
        "run": f"{name}-{optimizer}",
        "root": f"{folder}/runs",
        "segment_steps": 40,
        "threads": 1,
        "device": device,
        "optimizer": OPTIMIZERS[optimizer],
        "basis": BASES[optimizer],
        "launch": launch.model_dump(),
        "data": {"shards": f"{folder}/data/train-{{000000..000003}}.tar"},
        "targets": {"clean": {"shards": f"{folder}/data/target-000000.tar"}},
    }
    plan["stages"] = [plan["stages"][0] | {"epochs": 2}, plan["stages"][1]]
    plan.pop("audit")
    return Plan.model_validate(plan)


def _format(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counts.items())


if __name__ == "__main__":
    main()

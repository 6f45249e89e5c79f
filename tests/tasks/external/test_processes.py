"""A user's own loop in several processes: the ledger of one process, and resuming with others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from secateur.tasks.plan import Plan
from secateur.tasks.plan.plan_file import plan_text
from secateur.tasks.run import Run
from tests.tasks.ranks import ledger_distance, torchrun
from tests.tasks.small import curate_small, make_data, small_plan

LOOP = "tests.tasks.external.own_loop"

SGD: dict[str, Any] = {"kind": "sgd", "lr": 0.2, "momentum": 0.5, "weight_decay": 0.01}
ADAMW: dict[str, Any] = {"kind": "adamw", "lr": 0.01, "weight_decay": 0.01}
KRONECKER = {"kind": "kronecker", "method": "pca", "rank": 4, "fit_steps": 3}
COORDINATES = {"kind": "coordinates", "numbers": 200, "fit_steps": 3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("processes")
    make_data(folder)
    return folder


def plan_of(folder: Path, name: str, optimizer: dict[str, Any], **changes: Any) -> Plan:
    """A plan without random draws, with batches that two processes cannot divide evenly."""
    basis = KRONECKER if optimizer["kind"] == "sgd" else COORDINATES
    return small_plan(
        folder,
        run=name,
        dtype="float64",
        model={"factory": "tests.tasks.digits:network", "args": {"dropout": 0.0}},
        optimizer=optimizer | {"clip_norm": 1.0},
        basis=basis,
        stages=[
            {"epochs": 3, "batch_size": 25, "prune": {"policy": "top", "keep": 0.5}},
            {"steps": 8, "batch_size": 20},
        ],
        **{"score": {"estimate": "embedding"}, **changes},
    )


def write(plan: Plan, folder: Path) -> str:
    path = folder / f"{plan.run}.yaml"
    path.write_text(plan_text(plan))
    return str(path)


@pytest.mark.slow
def test_two_processes_record_what_one_records(folder: Path) -> None:
    """Under DDP, with and without accumulation, and under FSDP2, for SGD and AdamW."""
    cases, expected = [], {}
    for optimizer in (SGD, ADAMW):
        one = curate_small(plan_of(folder, f"one-{optimizer['kind']}", optimizer))
        for wrapping, micro_batches in (("ddp", 1), ("ddp", 2), ("fsdp", 1), ("fsdp", 2)):
            name = f"{wrapping}-{micro_batches}-{optimizer['kind']}"
            path = write(plan_of(folder, name, optimizer), folder)
            cases.append(f"{path}:{wrapping}:{micro_batches}:-1")
            expected[name] = one
    torchrun(2, LOOP, *cases)
    for name, one in expected.items():
        other = Run.open(f"{folder}/runs/{name}")
        assert ledger_distance(one, other) < 1e-9, name


@pytest.mark.server
@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2), (2, 3)])
def test_a_stage_continues_with_another_number_of_processes(
    folder: Path, before: int, after: int
) -> None:
    one = curate_small(plan_of(folder, "whole", ADAMW))
    path = write(plan_of(folder, f"from-{before}-to-{after}", ADAMW), folder)
    wrapping = {1: "plain", 2: "fsdp", 3: "ddp"}
    torchrun(before, LOOP, f"{path}:{wrapping[before]}:1:14")
    other = Run.open(f"{folder}/runs/from-{before}-to-{after}")
    assert len(other.folder.stage(0).segments()) == 2
    torchrun(after, LOOP, f"{path}:{wrapping[after]}:1:-1")
    assert ledger_distance(one, other) < 1e-9

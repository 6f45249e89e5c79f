"""A small project for tests: scikit-learn's digits, and a plan of two stages."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.datasets import load_digits

from examples.shards import write_shards
from secateur.flows.stage import (
    audit_stage,
    measure_agreement,
    prune_stage,
    score_stage,
    train_stage,
)
from secateur.flows.workers import InlineWorkers
from secateur.influence.adjoint import step_back
from secateur.tasks.plan import Plan
from secateur.tasks.run import Run

INLINE = InlineWorkers()


@cache
def _digits() -> Any:
    return load_digits()


def sample(number: int, **changes: bytes) -> dict[str, Any]:
    """Return one digit as a sample."""
    digits = _digits()
    raw = (digits.data[number] / 16).astype(np.float32).tobytes()
    label = int(digits.target[number])
    facts = json.dumps({"parity": "odd" if label % 2 else "even"}).encode()
    return {
        "__key__": f"digit-{number:04d}",
        "raw": raw,
        "cls": str(label).encode(),
        "json": facts,
    } | changes


def make_data(folder: Path, extra: list[dict[str, Any]] | None = None) -> None:
    """Write two shards of 70 training samples each, and a target of 24 samples.

    Args:
        extra: samples at the end of the second shard.
    """
    write_shards(f"{folder}/train-%d.tar", [*map(sample, range(140)), *(extra or [])], 2)
    write_shards(f"{folder}/target-%d.tar", list(map(sample, range(200, 224))), 1)


def values(folder: Path, **changes: Any) -> dict[str, Any]:
    """Return the plan's keys: two stages, the first with two windows, momentum and clipping."""
    return {
        "run": "small",
        "root": f"{folder}/runs",
        "threads": 1,
        "model": {"factory": "tests.tasks.digits:network"},
        "task": {"factory": "tests.tasks.digits:Digits"},
        "data": {"shards": f"{folder}/train-{{0..1}}.tar"},
        "targets": {"clean": {"shards": f"{folder}/target-0.tar"}},
        "optimizer": {
            "kind": "sgd",
            "lr": 0.2,
            "momentum": 0.5,
            "weight_decay": 0.01,
            "clip_norm": 1.0,
        },
        "stages": [
            {
                "epochs": 3,
                "batch_size": 20,
                "windows": [{"start": 0.0, "stop": 0.25}, {"start": 0.75, "stop": 1.0}],
                "stride": 2,
                "prune": {"policy": "top", "keep": 0.5},
            },
            {"steps": 10, "batch_size": 20},
        ],
        "segment_steps": 6,
        "basis": {"kind": "kronecker", "method": "pca", "rank": 4, "fit_steps": 3},
        **changes,
    }


def small_plan(folder: Path, **changes: Any) -> Plan:
    """Return the plan, with some of its keys replaced."""
    return Plan.model_validate(values(folder, **changes))


def curate_small(plan: Plan) -> Run:
    """Run a plan to its end as `secateur run` does, without Prefect, profiles and reports."""
    run = Run.start(plan)
    for stage, config in enumerate(plan.stages):
        train_stage(INLINE, run.url, stage)
        score_small(run, stage)
        if config.prune:
            prune_stage(INLINE, run.url, stage)
    return run


def score_small(run: Run, stage: int) -> None:
    """Embed, index and score a trained stage, and compare its answers and audit it if planned."""
    score_stage(INLINE, run.url, stage)
    if run.plan.trust.asked:
        measure_agreement(INLINE, run.url, stage)
    if run.plan.audits(stage):
        audit_stage(INLINE, run.url, stage)


def interrupt_replay(monkeypatch: pytest.MonkeyPatch, at: int) -> list[int]:
    """Let replay be interrupted once, at its step of this number. Its steps are listed as taken."""
    taken: list[int] = []

    def step(*arguments: Any) -> Any:
        taken.append(len(taken) + 1)
        if taken[-1] == at:
            raise KeyboardInterrupt
        return step_back(*arguments)

    monkeypatch.setattr("secateur.tasks.valuation.replay.step_back", step)
    return taken

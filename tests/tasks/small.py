"""A small project for tests: scikit-learn's digits, a small network, and a plan of two stages."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional

from examples.shards import write_shards
from secateur.flows.stage import audit_stage, prune_stage, score_stage, train_stage
from secateur.flows.workers import InlineWorkers
from secateur.tasks.plan import Plan
from secateur.tasks.run import Run

INLINE = InlineWorkers()


class Digits:
    """Reads `raw` images and `cls` labels. A label of `nan` has a loss that is not finite."""

    def collate(self, samples: list[dict[str, Any]]) -> dict[str, Tensor]:
        pixels = np.stack([np.frombuffer(s["raw"], np.float32).reshape(64) for s in samples])
        labels = [float(s["cls"]) for s in samples]
        return {"x": torch.from_numpy(pixels), "y": torch.tensor(labels)}

    def losses(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        x = batch["x"].to(next(model.parameters()).dtype)
        losses = functional.cross_entropy(
            model(x), batch["y"].nan_to_num().long(), reduction="none"
        )
        return torch.where(batch["y"].isnan(), torch.nan, losses)

    def sizes(self, batch: dict[str, Tensor]) -> Tensor:
        return 1 + batch["y"]

    def metrics(self, model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        x = batch["x"].to(next(model.parameters()).dtype)
        return {"accuracy": (model(x).argmax(1) == batch["y"]).float()}

    def sampled(self, model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        x = batch["x"].to(next(model.parameters()).dtype)
        return batch | {"y": torch.distributions.Categorical(logits=model(x)).sample().float()}


class Plain(Digits):
    """A task that cannot sample labels."""

    sampled = None  # type: ignore[assignment]


class Averaged(Digits):
    """A task that returns one loss per batch, where one per sample is needed."""

    def losses(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return super().losses(model, batch).mean()


def network(dropout: float = 0.1, uncaptured: bool = False, width: int = 12) -> nn.Module:
    """Return a 64-12-10 network. Its dropout makes steps depend on their random draws."""
    layers = [nn.Linear(64, width), nn.Tanh(), nn.Dropout(dropout), nn.Linear(width, 10)]
    return nn.Sequential(*layers, *([nn.PReLU()] if uncaptured else []))


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
        "model": {"factory": "tests.tasks.small:network"},
        "task": {"factory": "tests.tasks.small:Digits"},
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
    """Embed, index and score a trained stage, and audit it if the plan says so."""
    score_stage(INLINE, run.url, stage)
    if run.plan.audits(stage):
        audit_stage(INLINE, run.url, stage)

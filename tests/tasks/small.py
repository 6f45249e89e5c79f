"""A small project for tests: real digits (scikit-learn's), a small network, and a plan of two stages."""

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
from secateur.tasks.analysis.audit import is_audited, write_audit
from secateur.tasks.analysis.windows import freeze_windows
from secateur.tasks.data.samples import list_stage_samples
from secateur.tasks.plan import Plan
from secateur.tasks.pruning.gates import run_trial
from secateur.tasks.pruning.prune import write_pruned_stage
from secateur.tasks.run.run import Run
from secateur.tasks.training.fit_basis import fit_basis
from secateur.tasks.training.train import train_stage
from secateur.tasks.valuation.embed import compose_stage, embed_segment
from secateur.tasks.valuation.index import index_stage
from secateur.tasks.valuation.replay import replay_stage
from secateur.tasks.valuation.score import write_scores
from secateur.tasks.valuation.target_gradients import write_target_gradients


class Digits:
    """Reads `npy` images and `cls` labels; a label of `nan` gives a loss that is not finite."""

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
    """Cannot draw labels."""

    sampled = None  # type: ignore[assignment]


class Averaged(Digits):
    """Gives one loss a batch, which is not what a task must give."""

    def losses(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return super().losses(model, batch).mean()


def network(dropout: float = 0.1, uncaptured: bool = False, width: int = 12) -> nn.Module:
    """64-12-10, with dropout so that random draws within a step count too."""
    layers = [nn.Linear(64, width), nn.Tanh(), nn.Dropout(dropout), nn.Linear(width, 10)]
    return nn.Sequential(*layers, *([nn.PReLU()] if uncaptured else []))


@cache
def _digits() -> Any:
    return load_digits()


def sample(number: int, **changes: bytes) -> dict[str, Any]:
    """One digit as a sample."""
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
    """Two shards to train on with 70 samples each, and a target of 24; `extra` samples end the second shard."""
    write_shards(f"{folder}/train-%d.tar", [*map(sample, range(140)), *(extra or [])], 2)
    write_shards(f"{folder}/target-%d.tar", list(map(sample, range(200, 224))), 1)


def values(folder: Path, **changes: Any) -> dict[str, Any]:
    """The plan's keys: two stages, windows with a gap in the first, momentum, clipping."""
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
    """The plan, with some of its keys replaced."""
    return Plan.model_validate(values(folder, **changes))


def curate_small(plan: Plan) -> Run:
    """What the flow does, without Prefect."""
    run = Run.start(plan)
    for stage, spec in enumerate(plan.stages):
        list_stage_samples.fn(run.url, stage)
        freeze_windows.fn(run.url, stage)
        if stage == 0:
            fit_basis.fn(run.url)
        train_stage.fn(run.url, stage)
        score_small(run, stage)
        if spec.prune:
            if plan.trust.trial:
                run_trial.fn(run.url, stage, "plan", spec.prune.model_dump())
            write_pruned_stage.fn(run.url, stage)
    return run


def score_small(run: Run, stage: int) -> None:
    """Embeds, indexes and scores a trained stage."""
    if not run.folder.stage(stage).embeddings.committed:
        for number in range(len(run.folder.stage(stage).segments())):
            embed_segment.fn(run.url, stage, number)
    compose_stage.fn(run.url, stage)
    index_stage.fn(run.url, stage)
    write_target_gradients.fn(run.url, stage)
    if run.plan.estimate == "replay":
        replay_stage.fn(run.url, stage)
    write_scores.fn(run.url, stage)
    if is_audited(run.plan, stage):
        write_audit.fn(run.url, stage)

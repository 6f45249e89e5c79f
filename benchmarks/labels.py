"""The study of wrong labels: what each score finds, and what training on each arm's samples comes to."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from pydantic import TypeAdapter
from sklearn.metrics import roc_auc_score
from torch import nn
from torch.nn import functional

from benchmarks.arms import Arms, best, decoded, first_stage, judged
from benchmarks.mislabelled import Pictures, make
from examples.images.model import mlp
from tasks.decide import decide
from tasks.loop import Tensors
from tasks.plan import Plan, Policy, Score
from tasks.replay import replay, replay_scores
from tasks.run import Run
from tasks.samples import target_samples
from tasks.score import aggregate, scored_vectors, stage_scores
from tasks.targets import scoring_gradients
from tasks.tracin import policy_scores

KEEP = 0.7
EPOCHS, LONGER = 6, 3  # the second stage takes three times the first one's steps
BASELINES = ("loss", "grand", "el2n", "tracin")
SHORT = 20
SWEEP: dict[str, dict[str, Any]] = {
    "nearest 1": {"nearest": 1},
    "nearest 3": {"nearest": 3},
    "nearest 10": {"nearest": 10},
    "nearest 30": {"nearest": 30},
    f"nearest 10, horizon {SHORT}": {"horizon": SHORT},
    "nearest 10, horizon stage": {"horizon": "stage", "estimate": "embedding"},
    "mean": {"aggregate": "mean"},
    f"mean, horizon {SHORT}": {"aggregate": "mean", "horizon": SHORT},
    "mean, horizon stage": {"aggregate": "mean", "horizon": "stage", "estimate": "embedding"},
}


def plan_of(folder: Path, name: str, seed: int, samples: int) -> Plan:
    """Two stages of an MLP 784-128-10; half of the target scores, half judges."""
    steps = EPOCHS * -(-samples // 64)
    return Plan.model_validate(
        {
            "run": "run",
            "root": str(folder),
            "seed": seed,
            "threads": 1,
            "model": {"factory": "examples.images.model:mlp", "args": {"hidden": 128}},
            "task": {"factory": "benchmarks.mislabelled:Pictures"},
            "data": {"shards": f"{folder}/data/train-{{000000..000003}}.tar"},
            "targets": {"clean": {"shards": f"{folder}/data/target-000000.tar", "judging": 0.5}},
            "optimizer": {"kind": "sgd", "lr": 0.2},
            "schedule": {"kind": "cosine", "warmup": 0.1},
            "segment_steps": 250,
            "stages": [
                {"epochs": EPOCHS, "batch_size": 64, "prune": {"policy": "top", "keep": KEEP}},
                {"steps": LONGER * steps, "batch_size": 64},
            ],
        }
    )


def study(folder: Path, name: str, kind: str, seed: int, arms: bool) -> dict[str, Any]:
    """Areas under the ROC curve, and with `arms` each one's figures on clean test data."""
    make(folder / "data", name, kind, seed)
    samples = json.loads((folder / "samples.json").read_text()) if (folder / "samples.json").exists() else None
    from benchmarks.mislabelled import SIZES

    run = first_stage(plan_of(folder, name, seed, SIZES[name][0]))
    held = Arms.of(run)
    facts = [json.loads(s["json"]) for s in held.samples.read(range(len(held.samples)))]
    true = torch.tensor([f["true"] for f in facts])
    wrong = (true != held.tensors["labels"]).numpy()
    scores = all_scores(run, held)
    scores["ideal"] = cross_fitted(held.tensors, true, seed)
    found: dict[str, Any] = {"share": float(wrong.mean())}
    found["area"] = {which: float(roc_auc_score(wrong, -s)) for which, s in scores.items()}
    return found


def all_scores(run: Run, held: Arms) -> dict[str, np.ndarray]:
    """A value a sample for every score and baseline, high where it should be kept."""
    found = {name: swept(run, Score(**settings)) for name, settings in SWEEP.items()}
    replay.fn(run.url, 0)
    count = len(run.folder.stage(0).segments())
    per_use = np.concatenate([replay_scores(run, 0, n)["clean"].numpy() for n in range(count)])
    uses = stage_scores(run, 0).with_columns(value=per_use).group_by("sample").agg(pl.col("value").sum()).sort("sample")
    found["mean, replay"] = uses["value"].to_numpy()
    for policy in BASELINES:
        chosen: Policy = TypeAdapter(Policy).validate_python({"policy": policy, "keep": KEEP})
        decisions = decide(run.plan, 0, chosen, policy_scores(run, 0, chosen), held.samples)
        found[policy] = -decisions["rank"].to_numpy().astype(float)
    return found


def swept(run: Run, score: Score) -> np.ndarray:
    """Each sample's score under other settings, from the same ledger."""
    other = Run(run.plan.model_copy(update={"score": score}), run.folder)
    gradients = scoring_gradients(run, 0, "clean")
    parts = [
        pl.DataFrame({"sample": s.samples[s.selected].numpy(), "value": aggregate(other, vectors, gradients)})
        for s, vectors in scored_vectors(other, 0)
    ]
    total = pl.col("value").sum() if score.aggregate == "mean" else pl.col("value").last()
    return pl.concat(parts).group_by("sample", maintain_order=True).agg(total).sort("sample")["value"].to_numpy()


def cross_fitted(tensors: Tensors, true: torch.Tensor, seed: int) -> np.ndarray:
    """The log-probability of each given label under a model of the same kind that was trained on the right labels of the
    other half: about the best that can be told from an image by such a model."""
    scores = torch.empty(len(true))
    half = torch.arange(len(true)) % 2 == 0
    for train in (half, ~half):
        torch.manual_seed(seed)
        model, rows = mlp(128), train.nonzero().flatten()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
        for _ in range(2 * EPOCHS):
            for batch in rows[torch.randperm(len(rows))].split(64):
                optimizer.zero_grad()
                functional.cross_entropy(model(tensors["images"][batch]), true[batch]).backward()
                optimizer.step()
        with torch.no_grad():
            scores[~train] = -Pictures().losses(model, {k: v[~train] for k, v in tensors.items()})
    return scores.numpy()

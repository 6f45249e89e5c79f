"""The study of wrong labels: what each score finds, and what training on each arm's samples comes to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from pydantic import TypeAdapter
from sklearn.metrics import roc_auc_score
from torch.nn import functional

from benchmarks.arms import Arms, best, decoded, first_stage, judged
from benchmarks.mislabelled import SIZES, Pictures, make
from examples.images.model import mlp
from secateur.tasks.data.samples import list_target_samples
from secateur.tasks.engine.progress import print_status
from secateur.tasks.plan import Plan, Policy, ScoreConfig
from secateur.tasks.pruning.decide import decide_samples
from secateur.tasks.run.run import Run
from secateur.tasks.training.loop import Tensors
from secateur.tasks.valuation.replay import read_replay_scores, replay_stage
from secateur.tasks.valuation.score import aggregate, read_scores, scored_vectors
from secateur.tasks.valuation.target_gradients import read_scoring_gradients
from secateur.tasks.valuation.tracin import read_policy_scores

KEEP = 0.7
EPOCHS, BATCH, LONGER = 6, 128, 2  # the second stage takes twice the first one's steps
BASELINES = ("loss", "el2n", "grand", "tracin")
DEFAULT = "nearest 0.1"
SHORT = 10
AGGREGATES: dict[str, dict[str, Any]] = {
    "nearest 0.03": {"temperature": 0.03},
    DEFAULT: {"temperature": 0.1},
    "nearest 0.3": {"temperature": 0.3},
    "mean": {"aggregate": "mean"},
}
LATER = (DEFAULT, "mean")  # what longer horizons are combined with


def plan_of(folder: Path, name: str, seed: int, samples: int) -> Plan:
    """Two stages of an MLP 784-128-10; half of the target scores, half judges."""
    steps = EPOCHS * -(-samples // BATCH)
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
            "optimizer": {"kind": "sgd", "lr": 0.3},
            "schedule": {"kind": "cosine", "warmup": 0.1},
            "segment_steps": 250,
            "stages": [
                {"epochs": EPOCHS, "batch_size": BATCH, "prune": {"policy": "top", "keep": KEEP}},
                {"steps": LONGER * steps, "batch_size": BATCH},
            ],
        }
    )


def study(folder: Path, name: str, kind: str, seed: int) -> dict[str, Any]:
    """Areas under the ROC curve, and every arm's figures on clean test data."""
    make(folder / "data", name, kind, seed)
    run = first_stage(plan_of(folder, name, seed, SIZES[name][0]))
    held = Arms.of(run)
    facts = [json.loads(s["json"]) for s in held.samples.read(range(len(held.samples)))]
    true = torch.tensor([fact["true"] for fact in facts])
    wrong = (true != held.tensors["labels"]).numpy()
    scores = all_scores(run, held)
    scores["ideal"] = cross_fitted(held.tensors, true, seed)
    found: dict[str, Any] = {"share": float(wrong.mean())}
    found["area"] = {
        which: float(roc_auc_score(wrong, -values)) for which, values in scores.items()
    }
    found["arms"] = _arms(run, held, scores, wrong)
    return found


def _arms(
    run: Run, held: Arms, scores: dict[str, np.ndarray], wrong: np.ndarray
) -> dict[str, dict[str, float]]:
    """What each arm keeps and comes to."""
    ruled = {"ours": scores[DEFAULT], **{name: scores[name] for name in (*BASELINES, "ideal")}}
    keeps = {name: best(values, KEEP) for name, values in ruled.items()}
    keeps["ours, score not under 0"] = scores[DEFAULT] >= 0
    keeps["random"] = np.random.default_rng(run.plan.seed).permutation(keeps["ours"])
    keeps["unpruned"], keeps["oracle"] = np.ones(len(wrong), bool), ~wrong
    test = {
        "test": run.plan.targets["clean"].model_copy(
            update={"shards": str(Path(run.plan.root, "data/test-000000.tar"))}
        )
    }
    judging = decoded(
        run,
        list_target_samples(Run(run.plan.model_copy(update={"targets": test}), run.folder), "test"),
    )
    found = {}
    for name, keep in keeps.items():
        print_status(f"  second stage: {name}")
        figures = judged(run, held.second_stage(keep), judging)
        found[name] = {"kept": float(keep.mean()), "wrong": float(wrong[keep].mean()), **figures}
    return found


def all_scores(run: Run, held: Arms) -> dict[str, np.ndarray]:
    """A value a sample for every score and baseline, high where it should be kept."""
    found = swept(run, 0, list(AGGREGATES))
    for horizon in (SHORT, "stage"):
        found |= {
            f"{name}, horizon {horizon}": v for name, v in swept(run, horizon, list(LATER)).items()
        }
    found["mean, replay"] = _replayed(run)
    for policy in BASELINES:
        chosen: Policy = TypeAdapter(Policy).validate_python({"policy": policy, "keep": KEEP})
        decisions = decide_samples(
            run.plan, 0, chosen, read_policy_scores(run, 0, chosen), held.samples
        )
        found[policy] = -decisions["rank"].to_numpy().astype(float)
    return found


def swept(run: Run, horizon: Any, names: list[str]) -> dict[str, np.ndarray]:
    """Each sample's score under several aggregates of one horizon, from the same ledger."""
    gradients = read_scoring_gradients(run, 0, "clean")
    settings = {
        name: ScoreConfig(horizon=horizon, estimate="embedding", **AGGREGATES[name])
        for name in names
    }
    runs = {
        n: Run(run.plan.model_copy(update={"score": score}), run.folder)
        for n, score in settings.items()
    }
    parts = [
        pl.DataFrame(
            {"sample": s.samples[s.selected].numpy()}
            | {n: aggregate(r, vectors, gradients) for n, r in runs.items()}
        )
        for s, vectors in scored_vectors(runs[names[0]], 0)
    ]
    totals = [
        pl.col(n).sum() if settings[n].aggregate == "mean" else pl.col(n).last() for n in names
    ]
    uses = pl.concat(parts).group_by("sample", maintain_order=True).agg(totals).sort("sample")
    return {name: uses[name].to_numpy() for name in names}


def _replayed(run: Run) -> np.ndarray:
    """Each sample's effect on the target at the stage's end, over its uses, by replay."""
    replay_stage.fn(run.url, 0)
    count = len(run.folder.stage(0).segments())
    effects = np.concatenate(
        [read_replay_scores(run, 0, number)["clean"].numpy() for number in range(count)]
    )
    uses = (
        read_scores(run, 0)
        .with_columns(effect=effects)
        .group_by("sample")
        .agg(pl.col("effect").sum())
    )
    return uses.sort("sample")["effect"].to_numpy()


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

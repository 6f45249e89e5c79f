"""The study of wrong labels: what each score finds, and the accuracy after training on each arm."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from sklearn.metrics import roc_auc_score
from torch.nn import functional

from benchmarks.arms import Arms, decode_samples, evaluate, mark_best, start_scored
from benchmarks.mislabelled import SIZES, Pictures, make
from examples.images.model import mlp
from secateur.tasks.data.collate import Tensors
from secateur.tasks.data.samples import list_target_samples
from secateur.tasks.engine.progress import print_status
from secateur.tasks.plan import POLICIES, Plan, ScoreConfig
from secateur.tasks.pruning.context import PruningContext
from secateur.tasks.pruning.decide import decide_samples
from secateur.tasks.results.valuation_results import (
    read_replay_scores,
    read_scores,
    read_scoring_gradients,
)
from secateur.tasks.run import Run
from secateur.tasks.valuation.replay import replay_stage
from secateur.tasks.valuation.score import aggregate_scores, scored_vectors

KEEP = 0.7
# The second stage takes twice as many steps as the first one.
EPOCHS, BATCH, LONGER = 6, 128, 2
BASELINES = ("loss", "el2n", "grand", "tracin")
DEFAULT = "nearest 0.1"
SHORT = 10
AGGREGATES: dict[str, dict[str, Any]] = {
    "nearest 0.03": {"temperature": 0.03},
    DEFAULT: {"temperature": 0.1},
    "nearest 0.3": {"temperature": 0.3},
    "mean": {"aggregate": "mean"},
}
WITH_HORIZONS = (DEFAULT, "mean")  # the aggregates that longer horizons are combined with


def make_plan(folder: Path, name: str, seed: int, samples: int) -> Plan:
    """Return a plan of two stages of an MLP 784-128-10. Half of the target is held out."""
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
    """Return areas under the ROC curve, and every arm's figures on clean test data."""
    make(folder / "data", name, kind, seed)
    run = start_scored(make_plan(folder, name, seed, SIZES[name][0]))
    arms = Arms.of_run(run)
    samples = arms.samples.read(range(len(arms.samples)))
    true = torch.tensor([json.loads(sample["json"])["true"] for sample in samples])
    wrong = (true != arms.tensors["labels"]).numpy()
    scores = compute_scores(run, arms)
    scores["ideal"] = cross_fit(arms.tensors, true, seed)
    areas = {score: float(roc_auc_score(wrong, -values)) for score, values in scores.items()}
    return {
        "share": float(wrong.mean()),
        "area": areas,
        "arms": _evaluate_arms(run, arms, scores, wrong),
    }


def _evaluate_arms(
    run: Run, arms: Arms, scores: dict[str, np.ndarray], wrong: np.ndarray
) -> dict[str, dict[str, float]]:
    """What each arm keeps, and its figures on clean test data after a second stage."""
    ranked = {"ours": scores[DEFAULT], **{name: scores[name] for name in (*BASELINES, "ideal")}}
    keeps = {name: mark_best(values, KEEP) for name, values in ranked.items()}
    keeps["ours, score not under 0"] = scores[DEFAULT] >= 0
    keeps["random"] = np.random.default_rng(run.plan.seed).permutation(keeps["ours"])
    keeps["unpruned"] = np.ones(len(wrong), bool)
    keeps["oracle"] = ~wrong
    shards = str(Path(run.plan.root, "data/test-000000.tar"))
    test = run.plan.targets["clean"].model_copy(update={"shards": shards})
    test_run = Run(run.plan.model_copy(update={"targets": {"test": test}}), run.folder)
    tensors = decode_samples(run, list_target_samples(test_run, "test"))
    results = {}
    for name, keep in keeps.items():
        print_status(f"  second stage: {name}")
        figures = evaluate(run, arms.train_second_stage(keep), tensors)
        results[name] = {"kept": float(keep.mean()), "wrong": float(wrong[keep].mean()), **figures}
    return results


def compute_scores(run: Run, arms: Arms) -> dict[str, np.ndarray]:
    """Return one value per sample for every score and baseline, high if it should be kept."""
    scores = sample_scores(run, 0, list(AGGREGATES))
    for horizon in (SHORT, "stage"):
        for name, values in sample_scores(run, horizon, list(WITH_HORIZONS)).items():
            scores[f"{name}, horizon {horizon}"] = values
    scores["mean, replay"] = _replay_scores(run)
    context = PruningContext(run, 0, arms.samples)
    for name in BASELINES:
        policy = POLICIES.parse({"policy": name, "keep": KEEP})
        decisions = decide_samples(policy, context)
        scores[name] = -decisions["rank"].to_numpy().astype(float)
    return scores


def sample_scores(run: Run, horizon: Any, names: list[str]) -> dict[str, np.ndarray]:
    """Return each sample's score under several aggregates of one horizon, from the same ledger."""
    gradients = read_scoring_gradients(run, 0, "clean")
    runs = {}
    totals = []
    for name in names:
        score = ScoreConfig(horizon=horizon, estimate="embedding", **AGGREGATES[name])
        runs[name] = Run(run.plan.model_copy(update={"score": score}), run.folder)
        column = pl.col(name)
        totals.append(column.sum() if score.aggregate == "mean" else column.last())
    parts = []
    for segment, vectors in scored_vectors(runs[names[0]], 0):
        columns: dict[str, Any] = {"sample": segment.samples[segment.selected].numpy()}
        for name, scored in runs.items():
            columns[name] = aggregate_scores(scored, vectors, gradients)
        parts.append(pl.DataFrame(columns))
    samples = pl.concat(parts).group_by("sample", maintain_order=True).agg(totals).sort("sample")
    return {name: samples[name].to_numpy() for name in names}


def _replay_scores(run: Run) -> np.ndarray:
    """Each sample's effect on the target at the stage's end, over its uses, by replay."""
    replay_stage(run, 0)
    segments = range(len(run.folder.stage(0).segments()))
    parts = [read_replay_scores(run, 0, number)["clean"].numpy() for number in segments]
    uses = read_scores(run, 0).with_columns(effect=np.concatenate(parts))
    samples = uses.group_by("sample").agg(pl.col("effect").sum()).sort("sample")
    return samples["effect"].to_numpy()


def cross_fit(tensors: Tensors, true: torch.Tensor, seed: int) -> np.ndarray:
    """Return the log-probability of each given label under a model trained on right labels.

    The model is of the same kind, and is trained on the right labels of the other half. That is
    about the best that such a model can say from an image.
    """
    scores = torch.empty(len(true))
    half = torch.arange(len(true)) % 2 == 0
    for train in (half, ~half):
        torch.manual_seed(seed)
        model = mlp(128)
        rows = train.nonzero().flatten()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
        for _ in range(2 * EPOCHS):
            for batch in rows[torch.randperm(len(rows))].split(64):
                optimizer.zero_grad()
                functional.cross_entropy(model(tensors["images"][batch]), true[batch]).backward()
                optimizer.step()
        other_half = {name: tensor[~train] for name, tensor in tensors.items()}
        with torch.no_grad():
            scores[~train] = -Pictures().losses(model, other_half)
    return scores.numpy()

"""Wrong labels in the image example: what each score finds, and the accuracy after each arm.

`python -m benchmarks.images [--seeds 5]`. Every arm trains the same first stage, then the same
number of further steps on what it keeps.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from typing import Any

import numpy as np
import polars as pl

from benchmarks.arms import train_and_score
from examples.images.make_shards import make
from examples.images.run import PLAN, measure_detection, read_flips
from secateur.storage.layout import PLAN_PRUNING
from secateur.storage.rewrite import rewrite_shards
from secateur.tasks.comparison.arm_runs import share_outputs
from secateur.tasks.data.samples import read_stage_samples
from secateur.tasks.plan import POLICIES, Plan, ScoreConfig
from secateur.tasks.plan.plan_file import read_plan
from secateur.tasks.pruning.context import PruningContext
from secateur.tasks.pruning.decide import decide_samples
from secateur.tasks.pruning.policies import TopPolicy
from secateur.tasks.pruning.prune import write_pruned_stage
from secateur.tasks.results.valuation_results import read_target_gradients
from secateur.tasks.run import Run
from secateur.tasks.valuation.score import aggregate_scores, scored_vectors

KEEP = 0.7
ARMS: dict[str, dict[str, Any] | None] = {
    "pruned": {"policy": "top", "keep": KEEP},
    "random": {"policy": "random", "keep": KEEP},
    "loss": {"policy": "loss", "keep": KEEP},
    "unpruned": None,
    "oracle": {"policy": "top", "keep": KEEP},
}
FIRST_ARM = next(iter(ARMS))
Figures = dict[str, list[dict[str, float]]]


def make_plan(arm: str, seed: int, root: str, **score_settings: Any) -> Plan:
    """Return the example's plan with the arm's policy."""
    shards = {name: {"shards": f"{root}/data/{name}-000000.tar"} for name in ("target", "test")}
    changes: dict[str, Any] = {
        "run": arm,
        "root": root,
        "seed": seed,
        "data": {"shards": f"{root}/data/train-{{000000..000003}}.tar"},
        "targets": {"clean": shards["target"], "test": shards["test"]},
    }
    plan = read_plan(PLAN, changes)
    settings = ARMS[arm]
    policy = POLICIES.parse(settings) if settings else None
    first = plan.stages[0].model_copy(update={"prune": policy})
    plan = plan.model_copy(update={"stages": [first, *plan.stages[1:]]})
    if score_settings:
        score = ScoreConfig(target="clean", **score_settings)
        plan = plan.model_copy(update={"score": score})
    return plan


def run_arm(arm: str, seed: int, root: str) -> tuple[Run, dict[str, float]]:
    """Run an arm, and return its loss and accuracy on clean test data after the second stage.

    The first stage is trained once per seed.
    """
    run = Run.start(make_plan(arm, seed, root))
    if arm != FIRST_ARM:
        share_outputs(run, f"{root}/{FIRST_ARM}")
    train_and_score(run, 0)
    if arm == "oracle":
        samples = read_stage_samples(run, 0)
        keep = read_flips(run) == "none"
        with run.folder.stage(0).prune(PLAN_PRUNING).attempt("prune", {}) as attempt:
            rewrite_shards(attempt, samples.urls, samples.frame, keep)
    elif ARMS[arm]:
        write_pruned_stage(run, 0)
    train_and_score(run, 1)
    return run, run.folder.stage(1).targets.manifest.facts["test"]


def measure_detections(run: Run, seed: int, root: str) -> dict[str, dict[str, float]]:
    """Return what `nearest`, `mean` and `loss` find, from the same first stage."""
    kinds = read_flips(run)
    decisions = decide_samples(TopPolicy(keep=KEEP), PruningContext.of_stage(run, 0))
    mean = Run(make_plan("pruned", seed, root, aggregate="mean"), run.folder)
    scores = {
        "nearest": decisions["score"].to_numpy(),
        "loss": -decisions["loss"].to_numpy(),
        "mean": _mean_scores(mean),
    }
    return {name: measure_detection(values, kinds) for name, values in scores.items()}


def _mean_scores(run: Run) -> np.ndarray:
    """Scores by the target's mean gradient, summed over the uses of a sample."""
    gradients = read_target_gradients(run, 0, "clean")
    parts = []
    for segment, vectors in scored_vectors(run, 0):
        scores = aggregate_scores(run, vectors, gradients)
        parts.append(pl.DataFrame({"sample": segment.samples.numpy(), "score": scores}))
    totals = pl.concat(parts).group_by("sample").agg(pl.col("score").sum()).sort("sample")
    return totals["score"].to_numpy()


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    seeds = range(parser.parse_args().seeds)
    areas: Figures = {}
    results: Figures = {arm: [] for arm in ARMS}
    for seed in seeds:
        with tempfile.TemporaryDirectory() as root:
            make(f"{root}/data", seed)
            for arm in ARMS:
                run, figures = run_arm(arm, seed, root)
                results[arm].append(figures)
                if arm == FIRST_ARM:
                    for name, found in measure_detections(run, seed, root).items():
                        areas.setdefault(name, []).append(found)
    _print_areas(areas, len(seeds))
    _print_results(results)


def _print_areas(areas: Figures, seeds: int) -> None:
    print(f"area under the ROC curve for wrong labels, {seeds} seeds: median (min to max)")
    for name, found in areas.items():
        spreads = [f"{kind} {_spread([one[kind] for one in found])}  " for kind in found[0]]
        print(f"  {name:8}", *spreads)


def _print_results(results: Figures) -> None:
    print("clean test data after the second stage: median (min to max)")
    for arm, figures in results.items():
        spreads = [f"{k} {_spread([f[k] for f in figures])}  " for k in ("accuracy", "loss")]
        print(f"  {arm:9}", *spreads)
    for key in ("accuracy", "loss"):
        for arm in ("pruned", "random", "loss"):
            rows = zip(results[arm], results["unpruned"], results["oracle"], strict=True)
            closed = [
                (own[key] - unpruned[key]) / (oracle[key] - unpruned[key])
                for own, unpruned, oracle in rows
            ]
            gap = f"share of the gap in {key} between unpruned and oracle that {arm} closes"
            print(f"  {gap}: {_spread(closed)}")


def _spread(values: list[float]) -> str:
    return f"{statistics.median(values):.3f} ({min(values):.3f} to {max(values):.3f})"


if __name__ == "__main__":
    main()

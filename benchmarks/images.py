"""Wrong labels in the image example: what each score finds, and what training on each arm's data comes to.

`python -m benchmarks.images [--seeds 5]`. Every arm trains the same first stage, then as many more steps on what it keeps.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from typing import Any

import numpy as np
import polars as pl
from pydantic import TypeAdapter

from benchmarks.arms import stage_through_scores
from examples.images.make_shards import make
from examples.images.run import PLAN, detection, flips
from secateur.storage.rewrite import rewrite_shards
from secateur.tasks.comparison.arm_runs import share_outputs
from secateur.tasks.data.samples import read_stage_samples
from secateur.tasks.plan import Plan, Policy, ScoreConfig, TopPolicy
from secateur.tasks.plan.plan_file import read_plan
from secateur.tasks.pruning.decide import decide_samples
from secateur.tasks.pruning.prune import PLAN_PRUNING, write_pruned_stage
from secateur.tasks.run.run import Run
from secateur.tasks.valuation.score import aggregate, read_scores, scored_vectors
from secateur.tasks.valuation.target_gradients import read_target_gradients

KEEP = 0.7
ARMS: dict[str, dict[str, Any] | None] = {
    "pruned": {"policy": "top", "keep": KEEP},
    "random": {"policy": "random", "keep": KEEP},
    "loss": {"policy": "loss", "keep": KEEP},
    "unpruned": None,
    "oracle": {"policy": "top", "keep": KEEP},
}


def plan_of(arm: str, seed: int, root: str, **score_settings: Any) -> Plan:
    """The example's plan with the arm's policy."""
    shards = {name: {"shards": f"{root}/data/{name}-000000.tar"} for name in ("target", "test")}
    changes: dict[str, Any] = {"run": arm, "root": root, "seed": seed}
    changes["data"] = {"shards": f"{root}/data/train-{{000000..000003}}.tar"}
    changes["targets"] = {"clean": shards["target"], "test": shards["test"]}
    plan = read_plan(PLAN, changes)
    policy = TypeAdapter(Policy | None).validate_python(ARMS[arm])
    first = plan.stages[0].model_copy(update={"prune": policy})
    plan = plan.model_copy(update={"stages": [first, *plan.stages[1:]]})
    return (
        plan.model_copy(update={"score": ScoreConfig(target="clean", **score_settings)})
        if score_settings
        else plan
    )


def accuracy(arm: str, seed: int, root: str) -> tuple[Run, dict[str, float]]:
    """Loss and accuracy on clean test data after the second stage; the first one is trained once a seed."""
    plan = plan_of(arm, seed, root)
    run = Run.start(plan)
    if arm != next(iter(ARMS)):
        share_outputs.fn(run.url, f"{root}/{next(iter(ARMS))}")
    stage_through_scores(run, 0)
    if arm == "oracle":
        samples = read_stage_samples(run, 0)
        with run.folder.stage(0).prune(PLAN_PRUNING).attempt("prune", {}) as attempt:
            rewrite_shards(attempt, samples.urls, samples.frame, flips(run) == "none")
    elif ARMS[arm]:
        write_pruned_stage.fn(run.url, 0)
    stage_through_scores(run, 1)
    return run, run.folder.stage(1).targets.manifest.facts["test"]


def detections(run: Run, seed: int, root: str) -> dict[str, dict[str, float]]:
    """What `nearest`, `mean` and `loss` find, from the same first stage."""
    kinds, samples = flips(run), read_stage_samples(run, 0)
    decisions = decide_samples(run.plan, 0, TopPolicy(keep=KEEP), read_scores(run, 0), samples)
    found = {"nearest": decisions["score"].to_numpy(), "loss": -decisions["loss"].to_numpy()}
    mean = Run(plan_of("pruned", seed, root, aggregate="mean"), run.folder)
    found["mean"] = _mean_scores(mean)
    return {name: detection(values, kinds) for name, values in found.items()}


def _mean_scores(run: Run) -> np.ndarray:
    """Scores by the target's mean gradient, summed over the uses of a sample."""
    gradients = read_target_gradients(run.folder.stage(0).targets, "clean")
    parts = [
        pl.DataFrame(
            {"sample": segment.samples.numpy(), "score": aggregate(run, vectors, gradients)}
        )
        for segment, vectors in scored_vectors(run, 0)
    ]
    return (
        pl.concat(parts)
        .group_by("sample")
        .agg(pl.col("score").sum())
        .sort("sample")["score"]
        .to_numpy()
    )


def main() -> None:
    """Prints both tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    seeds = range(parser.parse_args().seeds)
    found: dict[str, list[dict[str, float]]] = {}
    results: dict[str, list[dict[str, float]]] = {arm: [] for arm in ARMS}
    for seed in seeds:
        with tempfile.TemporaryDirectory() as root:
            make(f"{root}/data", seed)
            for arm in ARMS:
                run, figures = accuracy(arm, seed, root)
                results[arm].append(figures)
                if arm == "pruned":
                    for name, areas in detections(run, seed, root).items():
                        found.setdefault(name, []).append(areas)
    print(f"area under the ROC curve for wrong labels, {len(seeds)} seeds: median (min to max)")
    for name, areas in found.items():
        print(
            f"  {name:8}", *(f"{kind} {_spread([a[kind] for a in areas])}  " for kind in areas[0])
        )
    print("clean test data after the second stage: median (min to max)")
    for arm, figures in results.items():
        print(
            f"  {arm:9}",
            *(f"{k} {_spread([f[k] for f in figures])}  " for k in ("accuracy", "loss")),
        )
    for key in ("accuracy", "loss"):
        for arm in ("pruned", "random", "loss"):
            closed = [
                (results[arm][n][key] - results["unpruned"][n][key])
                / (results["oracle"][n][key] - results["unpruned"][n][key])
                for n in seeds
            ]
            print(
                f"  share of the gap in {key} between unpruned and oracle that {arm} closes: {_spread(closed)}"
            )


def _spread(values: list[float]) -> str:
    return f"{statistics.median(values):.3f} ({min(values):.3f} to {max(values):.3f})"


if __name__ == "__main__":
    main()

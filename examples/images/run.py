"""The image example finds wrong labels, and drops them between two stages.

`python -m examples.images.run`
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
from sklearn.metrics import roc_auc_score

from examples.closing import read_with_control, run_and_show
from examples.images.make_shards import make
from secateur.tasks.data.samples import read_stage_samples
from secateur.tasks.results.pruning_results import read_decisions
from secateur.tasks.run import Run

PLAN = "examples/images/plan.yaml"


def describe(sample: dict[str, Any]) -> str:
    """Describe the label that an image has, and the one that it should have."""
    facts = json.loads(sample["json"])
    wrong = "" if facts["flip"] == "none" else f", is a {facts['true']} ({facts['flip']} error)"
    return f"labelled {sample['cls'].decode()}{wrong}"


def read_flips(run: Run) -> np.ndarray:
    """Return the error of each label of the first stage: `none`, `random` or `systematic`."""
    samples = read_stage_samples(run, 0)
    facts = [json.loads(sample["json"]) for sample in samples.read(range(len(samples)))]
    return np.array([fact["flip"] for fact in facts])


def measure_detection(scores: np.ndarray, kinds: np.ndarray) -> dict[str, float]:
    """Return how well low scores find the wrong labels of each kind among the right ones.

    The measure is the area under the ROC curve.
    """
    areas = {}
    for kind in ("random", "systematic"):
        rows = (kinds == kind) | (kinds == "none")
        areas[kind] = float(roc_auc_score(kinds[rows] == kind, -scores[rows]))
    return areas


def main() -> None:
    """Write the shards, run the plan and its control, and print the final tables."""
    make("data/images", seed=0)
    plans = read_with_control(PLAN)
    run_and_show(plans, describe)
    run = Run.of_plan(plans[0])
    areas = measure_detection(read_decisions(run, 0)["score"].to_numpy(), read_flips(run))
    text = ", ".join(f"{kind} {area:.3f}" for kind, area in areas.items())
    print(f"area under the ROC curve for finding the wrong labels: {text}")
    command = f"secateur query {run.url} --target clean --top 5 --harmful"
    print(f"the run is in {run.url}; ask it: {command}")


if __name__ == "__main__":
    main()

"""The image example: wrong labels found and left out between two stages; `python -m examples.images.run`."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
from sklearn.metrics import roc_auc_score

from examples.closing import run_and_show, with_control
from examples.images.make_shards import make
from secateur.tasks.data.samples import read_stage_samples
from secateur.tasks.pruning.prune import read_decisions
from secateur.tasks.run.run import Run

PLAN = "examples/images/plan.yaml"


def describe(sample: dict[str, Any]) -> str:
    """The label an image has, and the one it should have."""
    facts = json.loads(sample["json"])
    wrong = "" if facts["flip"] == "none" else f", is a {facts['true']} ({facts['flip']} error)"
    return f"labelled {sample['cls'].decode()}{wrong}"


def flips(run: Run) -> np.ndarray:
    """For each sample of the first stage `none`, `random` or `systematic`."""
    samples = read_stage_samples(run, 0)
    return np.array([json.loads(s["json"])["flip"] for s in samples.read(range(len(samples)))])


def detection(score: np.ndarray, kinds: np.ndarray) -> dict[str, float]:
    """Area under the ROC curve of low scores for finding the labels of each kind of error among the right ones."""
    found = {}
    for kind in ("random", "systematic"):
        asked = (kinds == kind) | (kinds == "none")
        found[kind] = float(roc_auc_score(kinds[asked] == kind, -score[asked]))
    return found


def main() -> None:
    """Makes the shards, runs the plan and its control, prints the closing tables."""
    make("data/images", seed=0)
    plans = with_control(PLAN)
    run_and_show(plans, describe)
    run = Run.of(plans[0])
    found = detection(read_decisions(run, 0)["score"].to_numpy(), flips(run))
    print(
        "area under the ROC curve for finding the wrong labels:",
        ", ".join(f"{k} {v:.3f}" for k, v in found.items()),
    )
    print(
        f"the run is in {run.url}; ask it: secateur query {run.url} --target clean --top 5 --harmful"
    )


if __name__ == "__main__":
    main()

"""The study of mixed text: how much of the target's domain each arm keeps, and the loss."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.arms import Arms, decode_samples, evaluate, start_scored
from examples.text.make_shards import make
from secateur.tasks.data.samples import list_target_samples
from secateur.tasks.engine.progress import print_status
from secateur.tasks.plan import POLICIES, Plan
from secateur.tasks.plan.plan_file import read_plan
from secateur.tasks.pruning.context import PruningContext
from secateur.tasks.pruning.decide import decide_samples

PLAN, TARGET, KEEP = "examples/text/plan.yaml", "manual", 0.5
ARMS = {"ours": "top", "tracin": "tracin", "loss": "loss", "random": "random"}


def study(folder: Path, seed: int) -> dict[str, Any]:
    """Return what each arm keeps and the loss it leads to.

    For every arm: the share that it keeps of every domain, and the loss on the target's test set
    after a second stage.
    """
    make(str(folder / "data"), seed)
    run = start_scored(make_plan(folder, seed))
    arms = Arms.of_run(run)
    test = decode_samples(run, list_target_samples(run, "test"))
    samples = arms.samples.read(range(len(arms.samples)))
    domains = np.array([json.loads(sample["json"])["domain"] for sample in samples])
    keeps = {"unpruned": np.ones(len(domains), bool), "oracle": domains == TARGET}
    context = PruningContext(run, 0, arms.samples)
    for name, policy in ARMS.items():
        rule = POLICIES.parse({"policy": policy, "keep": KEEP})
        keeps[name] = decide_samples(rule, context)["keep"].to_numpy()
    figures = run.folder.stage(0).targets.manifest.facts["test"]
    results: dict[str, Any] = {"first stage": figures}
    for name, keep in keeps.items():
        print_status(f"  second stage: {name}")
        shares = {domain: float(keep[domains == domain].mean()) for domain in sorted(set(domains))}
        evaluated = evaluate(run, arms.train_second_stage(keep), test)
        results[name] = {"kept": float(keep.mean()), **shares, **evaluated}
    return results


def make_plan(folder: Path, seed: int) -> Plan:
    """Return the text example's plan over the study's own data."""
    targets = {
        name: {"shards": f"{folder}/data/{part}-000000.tar"}
        for name, part in ((TARGET, "target"), ("test", "test"))
    }
    changes: dict[str, Any] = {
        "root": str(folder),
        "run": "run",
        "seed": seed,
        "threads": 1,
        "data": {"shards": f"{folder}/data/train-{{000000..000003}}.tar"},
        "targets": targets,
    }
    return read_plan(PLAN, changes)

"""The study of mixed text: how much of the target's domain each arm keeps, and what training on it comes to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import TypeAdapter

from benchmarks.arms import Arms, decoded, first_stage, judged
from examples.text.make_shards import make
from secateur.tasks.data.samples import list_target_samples
from secateur.tasks.engine.progress import print_status
from secateur.tasks.plan import Policy
from secateur.tasks.plan.plan_file import read_plan
from secateur.tasks.pruning.decide import decide_samples
from secateur.tasks.valuation.tracin import read_policy_scores

PLAN, TARGET, KEEP = "examples/text/plan.yaml", "manual", 0.5
ARMS = {"ours": "top", "tracin": "tracin", "loss": "loss", "random": "random"}


def study(folder: Path, seed: int) -> dict[str, Any]:
    """For each arm the share of every domain that it keeps, and the loss on the target's test after a second stage."""
    make(str(folder / "data"), seed)
    changes: dict[str, Any] = {"root": str(folder), "run": "run", "seed": seed, "threads": 1}
    changes["data"] = {"shards": f"{folder}/data/train-{{000000..000003}}.tar"}
    changes["targets"] = {
        n: {"shards": f"{folder}/data/{f}-000000.tar"}
        for n, f in ((TARGET, "target"), ("test", "test"))
    }
    run = first_stage(read_plan(PLAN, changes))
    held, judging = Arms.of(run), decoded(run, list_target_samples(run, "test"))
    domains = np.array(
        [json.loads(s["json"])["domain"] for s in held.samples.read(range(len(held.samples)))]
    )
    keeps = {"unpruned": np.ones(len(domains), bool), "oracle": domains == TARGET}
    for name, policy in ARMS.items():
        chosen: Policy = TypeAdapter(Policy).validate_python({"policy": policy, "keep": KEEP})
        scores = read_policy_scores(run, 0, chosen)
        keeps[name] = decide_samples(run.plan, 0, chosen, scores, held.samples)["keep"].to_numpy()
    found: dict[str, Any] = {"first stage": run.folder.stage(0).targets.manifest.facts["test"]}
    for name, keep in keeps.items():
        print_status(f"  second stage: {name}")
        shares = {domain: float(keep[domains == domain].mean()) for domain in sorted(set(domains))}
        found[name] = {
            "kept": float(keep.mean()),
            **shares,
            **judged(run, held.second_stage(keep), judging),
        }
    return found

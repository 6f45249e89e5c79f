"""Room `flows`: whether pruning pays: a plan beside random pruning and no pruning, over several seeds."""

from __future__ import annotations

import sys
import time
from typing import Any

from prefect import flow

from flows.prune import appraise, cut
from tasks.comparison.arms import Arm, check_arms
from tasks.comparison.figures import note_figures
from tasks.comparison.report import Comparison, report
from tasks.comparison.runs import comparable, first_pruned, judges, seed_plan, start_arm
from tasks.errors import PlanError
from tasks.fit import fit_basis
from tasks.plan import Plan
from tasks.reading import read_plan
from tasks.run import Run
from tasks.samples import list_samples
from tasks.targets import differentiate_targets
from tasks.train import train


@flow(name="compare", flow_run_name="compare {plan.run}")
def compare(
    plan: Plan, seeds: int = 5, arms: dict[str, dict[str, Any]] | None = None, judge: str | None = None
) -> Comparison:
    """Runs a plan, as many samples at random, no pruning, and further arms, over several seeds, and compares what the
    judging target says at the end. The arms of a seed share the first stage, up to the first pruning.

    Args:
        seeds: how many, from the plan's on.
        arms: further arms by name: a policy's settings, score settings, or both (`{"el2n": {"policy": "el2n"}}`).
        judge: the target that judges; by default another than the one pruned for, else half of that.

    Raises:
        PlanError: the plan prunes nothing, an arm cannot be, or what would judge scores too.
    """
    if seeds < 1:
        raise PlanError(f"{seeds} seeds give no comparison; ask for 1 or more, 5 for intervals worth reading")
    every = check_arms(arms or {})
    spec = comparable(plan, judge)
    telling = judges(spec, judge)
    chosen = [plan.seed + number for number in range(seeds)]
    urls: list[str] = []
    for seed in chosen:
        for name, arm in every.items():
            print(
                f"compare {plan.run}: seed {seed}, arm {name} ({len(urls) + 1} of {len(every) * seeds})",
                file=sys.stderr,
            )
            urls.append(_run_arm(seed_plan(spec, seed), name, arm, telling))
    shared = first_pruned(plan)
    assert shared is not None
    return report(plan.root, plan.run, chosen, telling[0], shared, urls)


@flow(name="compare file")
def compare_file(
    path: str, seeds: int = 5, arms: dict[str, dict[str, Any]] | None = None, judge: str | None = None
) -> Comparison:
    """Compares the plan in a YAML file: what a schedule names."""
    return compare(read_plan(path), seeds, arms, judge)


def _run_arm(plan: Plan, name: str, arm: Arm, telling: list[str]) -> str:
    """Runs one arm of one seed to its end; a stage is scored only where it is pruned."""
    run = Run.of(plan.model_copy(update={"run": name}))
    interrupted = run.folder.plan.committed and not run.folder.figures.committed
    url = start_arm(plan, name, arm)
    if run.folder.figures.committed:
        return url
    seconds: dict[int, float] = {}
    for stage, spec in enumerate(Run.open(url).plan.stages):
        list_samples(url, stage)
        if stage == 0:
            fit_basis(url)
        train(url, stage)
        if spec.prune is None:
            differentiate_targets(url, stage)
            continue
        began = time.monotonic()
        appraise(url, stage)
        cut(url, stage)
        seconds[stage] = time.monotonic() - began
    note_figures(url, plan.seed, telling, None if interrupted else seconds)
    return url

"""Room `flows`: whether pruning pays: a plan beside random pruning and no pruning, over several seeds."""

from __future__ import annotations

import time
from typing import Any

from prefect import flow

from flows import artifacts
from flows.alone import alone
from flows.stage import appraise, cut
from flows.workers import Crew, crew
from tasks.comparison.arms import PLAN, Arm, arm_plan, check_arms
from tasks.comparison.figures import note_figures
from tasks.comparison.report import Comparison, report
from tasks.comparison.runs import comparable, judges, needs_scores, seed_plan, share, start_arm
from tasks.errors import PlanError
from tasks.fit import fit_basis
from tasks.plan import Plan
from tasks.progress import say
from tasks.run import Run
from tasks.samples import list_samples
from tasks.targets import differentiate_targets
from tasks.train import train
from tasks.windows import settle_windows


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
    for name, arm in every.items():  # what cannot be is said before anything is trained
        arm_plan(spec, name, arm, dict.fromkeys(range(len(plan.stages)), 1.0))
    telling = judges(spec, judge)
    chosen = [plan.seed + number for number in range(seeds)]
    urls: list[str] = []
    with alone(Run.of(plan)), crew(plan.workers) as workers:
        for seed in chosen:
            for name, arm in every.items():
                say(f"compare {plan.run}: seed {seed}, arm {name} ({len(urls) + 1} of {len(every) * seeds})")
                urls.append(_run_arm(workers, seed_plan(spec, seed), name, arm, telling))
    found, picture = report(plan, chosen, telling[0], urls)
    artifacts.comparison(Run.of(plan), found, picture)
    return found


def _run_arm(workers: Crew, plan: Plan, name: str, arm: Arm, telling: list[str]) -> str:
    """Runs one arm of one seed to its end; stages are scored only as far as prunings need it."""
    folder = Run.of(plan.model_copy(update={"run": name})).folder
    interrupted = folder.plan.committed
    run = start_arm(plan, name, arm)
    if folder.figures.committed:
        return run.url
    if name != PLAN:
        workers.call(share, run.url, Run.of(plan.model_copy(update={"run": PLAN})).url)
    seconds: dict[int, float] = {}
    for stage, spec in enumerate(run.plan.stages):
        workers.call(list_samples, run.url, stage)
        workers.call(settle_windows, run.url, stage)
        if stage == 0:
            workers.call(fit_basis, run.url)
        workers.call(train, run.url, stage)
        workers.call(differentiate_targets, run.url, stage)
        began = time.monotonic()
        if needs_scores(run.plan, stage):
            appraise(workers, run.url, stage)
        if spec.prune is not None:
            cut(workers, run.url, stage)
        seconds[stage] = time.monotonic() - began
    workers.call(note_figures, run.url, plan.seed, telling, None if interrupted else seconds)
    return run.url

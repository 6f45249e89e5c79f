"""Room `flows`: whether pruning pays: a plan beside random pruning and no pruning, over several seeds."""

from __future__ import annotations

import time
from typing import Any

from prefect import flow

from secateur.errors import PlanError
from secateur.flows import run_artifacts
from secateur.flows.run_lock import exclusive_run
from secateur.flows.stage import prune_stage, score_stage
from secateur.flows.workers import WorkerPool, worker_pool
from secateur.tasks.analysis.windows import freeze_windows
from secateur.tasks.comparison.arm_runs import (
    comparable_plan,
    held_out_targets,
    needs_scores,
    seed_plan,
    share_outputs,
    start_arm,
)
from secateur.tasks.comparison.arms import PLAN, Arm, arm_plan, check_arms
from secateur.tasks.comparison.comparison_report import Comparison, write_comparison
from secateur.tasks.comparison.figures import write_figures
from secateur.tasks.data.samples import list_stage_samples
from secateur.tasks.engine.progress import print_status
from secateur.tasks.plan import Plan
from secateur.tasks.run.run import Run
from secateur.tasks.training.fit_basis import fit_basis
from secateur.tasks.training.train import train_stage
from secateur.tasks.valuation.target_gradients import write_target_gradients


@flow(name="compare", flow_run_name="compare {plan.run}")
def compare(
    plan: Plan,
    seeds: int = 5,
    arms: dict[str, dict[str, Any]] | None = None,
    judge: str | None = None,
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
        raise PlanError(
            f"{seeds} seeds give no comparison; ask for 1 or more, 5 for intervals worth reading"
        )
    every = check_arms(arms or {})
    spec = comparable_plan(plan, judge)
    for name, arm in every.items():  # what cannot be is said before anything is trained
        arm_plan(spec, name, arm, dict.fromkeys(range(len(plan.stages)), 1.0))
    telling = held_out_targets(spec, judge)
    chosen = [plan.seed + number for number in range(seeds)]
    urls: list[str] = []
    with exclusive_run(Run.of(plan)), worker_pool(plan.workers) as workers:
        for seed in chosen:
            for name, arm in every.items():
                print_status(
                    f"compare {plan.run}: seed {seed}, arm {name} ({len(urls) + 1} of {len(every) * seeds})"
                )
                urls.append(_run_arm(workers, seed_plan(spec, seed), name, arm, telling))
    found, picture = write_comparison(plan, chosen, telling[0], urls)
    run_artifacts.post_comparison(Run.of(plan), found, picture)
    return found


def _run_arm(workers: WorkerPool, plan: Plan, name: str, arm: Arm, telling: list[str]) -> str:
    """Runs one arm of one seed to its end; stages are scored only as far as prunings need it."""
    folder = Run.of(plan.model_copy(update={"run": name})).folder
    interrupted = folder.plan.committed
    run = start_arm(plan, name, arm)
    if folder.figures.committed:
        return run.url
    if name != PLAN:
        workers.call(share_outputs, run.url, Run.of(plan.model_copy(update={"run": PLAN})).url)
    seconds: dict[int, float] = {}
    for stage, spec in enumerate(run.plan.stages):
        workers.call(list_stage_samples, run.url, stage)
        workers.call(freeze_windows, run.url, stage)
        if stage == 0:
            workers.call(fit_basis, run.url)
        workers.call(train_stage, run.url, stage)
        workers.call(write_target_gradients, run.url, stage)
        began = time.monotonic()
        if needs_scores(run.plan, stage):
            score_stage(workers, run.url, stage)
        if spec.prune is not None:
            prune_stage(workers, run.url, stage)
        seconds[stage] = time.monotonic() - began
    workers.call(write_figures, run.url, plan.seed, telling, None if interrupted else seconds)
    return run.url

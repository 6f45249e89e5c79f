"""Does pruning pay? Compare a plan with random pruning and no pruning, over several seeds."""

from __future__ import annotations

import time
from typing import Any

from prefect import flow

from secateur.errors import PlanError
from secateur.flows import pipeline_tasks, run_artifacts
from secateur.flows.run_lock import exclusive_run
from secateur.flows.stage import (
    analyze_stage,
    prune_stage,
    release_checkpoints,
    score_stage,
    train_stage,
)
from secateur.flows.workers import Workers, worker_pool
from secateur.tasks.comparison.arm_runs import (
    comparable_plan,
    held_out_targets,
    seed_plan,
    start_arm,
)
from secateur.tasks.comparison.arms import (
    PLAN,
    Arm,
    arm_plan,
    check_arms,
    check_shared_checkpoints,
)
from secateur.tasks.comparison.comparison_report import Comparison, write_comparison
from secateur.tasks.engine.progress import print_status
from secateur.tasks.plan import Plan
from secateur.tasks.run import Run


@flow(name="compare", flow_run_name="compare {plan.run}")
def compare(
    plan: Plan,
    seeds: int = 5,
    arms: dict[str, dict[str, Any]] | None = None,
    judge: str | None = None,
) -> Comparison:
    """Run a plan, random pruning, no pruning and further arms, and compare them on held-out data.

    The arms of a seed share all outputs before the first pruning.

    Args:
        seeds: how many seeds, counted from the plan's.
        arms: further arms by name: a policy's settings, score settings, or both
            (`{"el2n": {"policy": "el2n"}}`).
        judge: the target to evaluate on. By default one that no samples are chosen by, else the
            held-out half of the pruning target.

    Raises:
        PlanError: the plan prunes nothing, an arm is wrong, or the target to evaluate on also
            scores training samples.
    """
    if seeds < 1:
        raise PlanError(
            f"{seeds} seeds give no comparison; ask for 1 or more, 5 for useful intervals"
        )
    all_arms = check_arms(arms or {})
    spec = comparable_plan(plan, judge)
    # Wrong settings of an arm are found before anything is trained.
    full_shares = dict.fromkeys(range(len(plan.stages)), 1.0)
    own = arm_plan(spec, PLAN, all_arms[PLAN], full_shares)
    for name, arm in all_arms.items():
        check_shared_checkpoints(own, arm_plan(spec, name, arm, full_shares))
    evaluated = held_out_targets(spec, judge)
    chosen = [plan.seed + number for number in range(seeds)]
    urls: list[str] = []
    with exclusive_run(Run.of_plan(plan)), worker_pool(plan.workers) as workers:
        for seed in chosen:
            for name, arm in all_arms.items():
                progress = f"{len(urls) + 1} of {len(all_arms) * seeds}"
                print_status(f"compare {plan.run}: seed {seed}, arm {name} ({progress})")
                urls.append(_run_arm(workers, seed_plan(spec, seed), name, arm, evaluated))
    comparison, picture = write_comparison(plan, chosen, evaluated[0], urls)
    run_artifacts.post_comparison(Run.of_plan(plan), comparison, picture)
    return comparison


def _run_arm(workers: Workers, plan: Plan, name: str, arm: Arm, evaluated: list[str]) -> str:
    """Run one arm of one seed to its end. Stages are scored only if a pruning needs it."""
    was_started = Run.of_plan(plan.model_copy(update={"run": name})).folder.plan.committed
    run = start_arm(plan, name, arm)
    if run.folder.figures.committed:
        return run.url
    if name != PLAN:
        own = Run.of_plan(plan.model_copy(update={"run": PLAN}))
        workers.call(pipeline_tasks.share_outputs, run.url, own.url)
    seconds: dict[int, float] = {}
    for stage, config in enumerate(run.plan.stages):
        train_stage(workers, run.url, stage, plan.launch)
        workers.call(pipeline_tasks.differentiate_targets, run.url, stage)
        started = time.monotonic()
        if run.plan.needs_scores(stage):
            score_stage(workers, run.url, stage)
            analyze_stage(workers, run.url, stage)
        if config.prune is not None:
            prune_stage(workers, run.url, stage)
        release_checkpoints(workers, run.url, stage)
        seconds[stage] = time.monotonic() - started
    # The times of an interrupted arm are not complete.
    timed = None if was_started else seconds
    workers.call(pipeline_tasks.write_figures, run.url, plan.seed, evaluated, timed)
    return run.url

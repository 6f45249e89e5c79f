"""The scheduled flow: train, embed, index, score and prune, stage by stage."""

from __future__ import annotations

from prefect import flow

from secateur.flows import events
from secateur.flows.deployment import with_scheduled_date
from secateur.flows.run_lock import exclusive_run
from secateur.flows.stage import (
    analyze_stage,
    prune_stage,
    release_checkpoints,
    report_stage,
    score_stage,
    train_stage,
)
from secateur.flows.workers import Workers, worker_pool
from secateur.tasks.plan import LaunchConfig, Plan
from secateur.tasks.reporting.summary import StageSummary, summarize_run
from secateur.tasks.run import Run


@flow(name="curate", flow_run_name="curate {plan.run}")
def curate(plan: Plan, dated: bool = False) -> list[StageSummary]:
    """Run a plan to its end. What an interrupted run has committed is not made again.

    Args:
        dated: append the scheduled time to the run's name, so that every scheduled flow run has a
            run of its own.

    Returns:
        A summary of every stage.

    Raises:
        PlanError, StorageError, SecateurError: what is wrong with plan, data or model, in one
            sentence.
    """
    run = Run.start(with_scheduled_date(plan) if dated else plan)
    with exclusive_run(run), worker_pool(plan.workers) as workers:
        curate_stages(workers, run, plan.launch)
    events.emit_finished(run.url)
    return summarize_run(Run.open(run.url))


def curate_stages(workers: Workers, run: Run, launch: LaunchConfig | None = None) -> None:
    """Train, score, prune and report every stage of a run.

    Args:
        launch: the processes that train; those of the plan that started the run if None.
    """
    for stage, config in enumerate(run.plan.stages):
        train_stage(workers, run.url, stage, launch)
        events.emit_trained(run.url, stage)
        score_stage(workers, run.url, stage)
        analyze_stage(workers, run.url, stage)
        if config.prune is not None:
            prune_stage(workers, run.url, stage)
        release_checkpoints(workers, run.url, stage)
        report_stage(workers, run.url, stage)

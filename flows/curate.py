"""Room `flows`: the scheduled flow: train, embed, index, score and prune, stage by stage."""

from __future__ import annotations

from prefect import flow

from secateur.flows import events
from secateur.flows.deployment import with_scheduled_date
from secateur.flows.run_lock import exclusive_run
from secateur.flows.stage import prune_stage, report_stage, score_stage
from secateur.flows.workers import worker_pool
from secateur.tasks.analysis.windows import freeze_windows
from secateur.tasks.data.samples import list_stage_samples
from secateur.tasks.plan import Plan
from secateur.tasks.reporting.summary import StageSummary, summarize_run
from secateur.tasks.run.run import Run
from secateur.tasks.training.fit_basis import fit_basis
from secateur.tasks.training.train import train_stage


@flow(name="curate", flow_run_name="curate {plan.run}")
def curate(plan: Plan, dated: bool = False) -> list[StageSummary]:
    """Runs a plan to its end; what an earlier, interrupted run has committed is taken as it is.

    Args:
        dated: the time this is scheduled for is put after the run's name, so that every scheduled run is one of its own.

    Returns:
        A summary of every stage.

    Raises:
        PlanError, StorageError, SecateurError: what is wrong with plan, data or model, in one sentence.
    """
    run = Run.start(with_scheduled_date(plan) if dated else plan)
    with exclusive_run(run), worker_pool(plan.workers) as workers:
        for stage, spec in enumerate(plan.stages):
            workers.call(list_stage_samples, run.url, stage)
            workers.call(freeze_windows, run.url, stage)
            if stage == 0:
                workers.call(fit_basis, run.url)
            workers.call(train_stage, run.url, stage)
            events.emit_trained(run.url, stage)
            score_stage(workers, run.url, stage)
            if spec.prune is not None:
                prune_stage(workers, run.url, stage)
            report_stage(workers, run.url, stage)
    events.emit_finished(run.url)
    return summarize_run(run.url)

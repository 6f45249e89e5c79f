"""Room `flows`: the scheduled flow: train, embed, index, score and prune, stage by stage."""

from __future__ import annotations

from prefect import flow

from flows import events
from flows.alone import alone
from flows.deployment import of_its_time
from flows.stage import appraise, cut, tell
from flows.workers import crew
from tasks.fit import fit_basis
from tasks.plan import Plan
from tasks.run import Run
from tasks.samples import list_samples
from tasks.summary import StageSummary, summarise
from tasks.train import train
from tasks.windows import settle_windows


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
    run = Run.start(of_its_time(plan) if dated else plan)
    with alone(run), crew(plan.workers) as workers:
        for stage, spec in enumerate(plan.stages):
            workers.call(list_samples, run.url, stage)
            workers.call(settle_windows, run.url, stage)
            if stage == 0:
                workers.call(fit_basis, run.url)
            workers.call(train, run.url, stage)
            events.trained(run.url, stage)
            appraise(workers, run.url, stage)
            if spec.prune is not None:
                cut(workers, run.url, stage)
            tell(workers, run.url, stage)
    events.finished(run.url)
    return summarise(run.url)

"""Room `flows`: the scheduled flow: train, embed, index, score and prune, stage by stage."""

from __future__ import annotations

from prefect import flow

from flows.stage import appraise, cut
from flows.workers import crew
from tasks.fit import fit_basis
from tasks.plan import Plan
from tasks.reading import read_plan
from tasks.run import Run
from tasks.samples import list_samples
from tasks.summary import StageSummary, summarise
from tasks.train import train


@flow(name="curate", flow_run_name="curate {plan.run}")
def curate(plan: Plan) -> list[StageSummary]:
    """Runs a plan to its end; what an earlier, interrupted run has committed is taken as it is.

    Returns:
        A summary of every stage.

    Raises:
        PlanError, StorageError, SecateurError: what is wrong with plan, data or model, in one sentence.
    """
    run = Run.start(plan)
    with crew(plan.workers) as workers:
        for stage, spec in enumerate(plan.stages):
            workers.call(list_samples, run.url, stage)
            if stage == 0:
                workers.call(fit_basis, run.url)
            workers.call(train, run.url, stage)
            appraise(workers, run.url, stage)
            if spec.prune is not None:
                cut(workers, run.url, stage)
    return summarise(run.url)


@flow(name="curate file")
def curate_file(path: str) -> list[StageSummary]:
    """Runs the plan in a YAML file: what a schedule names."""
    return curate(read_plan(path))

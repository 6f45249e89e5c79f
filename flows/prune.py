"""Room `flows`: pruning one stage of a run that exists, on request or on an event."""

from __future__ import annotations

from prefect import flow

from secateur.flows.run_lock import exclusive_run
from secateur.flows.stage import prune_stage, report_stage, score_stage
from secateur.flows.workers import worker_pool
from secateur.tasks.plan import Policy
from secateur.tasks.pruning.prune import PruneResult, unpruned_before
from secateur.tasks.run.run import Run
from secateur.tasks.training.train import end_checkpoint


@flow(name="prune", flow_run_name="prune {run} stage {stage}")
def prune(run: str, stage: int, policy: Policy | None = None) -> PruneResult | None:
    """Prunes a trained stage; what is missing of its embeddings, index and scores is made first. An earlier stage that the
    plan prunes and nobody has yet, because its event was lost or comes later, is pruned before it.

    Args:
        run: path or URL of the run's folder.
        policy: another policy than the plan's; its result stands beside the plan's own.

    Returns:
        Samples kept and dropped, and the shards; nothing where neither plan nor caller has a policy for the stage.

    Raises:
        PlanError: the stage or one before it is not wholly trained.
    """
    opened = Run.open(run)
    end_checkpoint(opened, stage)
    with exclusive_run(opened), worker_pool(opened.plan.workers) as workers:
        for earlier in unpruned_before(opened, stage):
            score_stage(workers, opened.url, earlier)
            prune_stage(workers, opened.url, earlier)
            report_stage(workers, opened.url, earlier)
        score_stage(workers, opened.url, stage)
        if policy is None and opened.plan.stages[stage].prune is None:
            found = None
        else:
            found = prune_stage(workers, opened.url, stage, policy)
        if policy is None:
            report_stage(workers, opened.url, stage)
        return found

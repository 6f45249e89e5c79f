"""Room `flows`: pruning one stage of a run that exists, on request or on an event."""

from __future__ import annotations

from prefect import flow

from flows.alone import alone
from flows.stage import appraise, cut, tell
from flows.workers import crew
from tasks.plan import Policy
from tasks.prune import Pruned, unpruned_before
from tasks.run import Run
from tasks.train import end_checkpoint


@flow(name="prune", flow_run_name="prune {run} stage {stage}")
def prune(run: str, stage: int, policy: Policy | None = None) -> Pruned | None:
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
    with alone(opened), crew(opened.plan.workers) as workers:
        for earlier in unpruned_before(opened, stage):
            appraise(workers, opened.url, earlier)
            cut(workers, opened.url, earlier)
            tell(workers, opened.url, earlier)
        appraise(workers, opened.url, stage)
        if policy is None and opened.plan.stages[stage].prune is None:
            found = None
        else:
            found = cut(workers, opened.url, stage, policy)
        if policy is None:
            tell(workers, opened.url, stage)
        return found

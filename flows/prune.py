"""Room `flows`: pruning one stage of a run that exists, on request or on an event."""

from __future__ import annotations

from prefect import flow

from flows.stage import appraise, cut
from flows.workers import crew
from tasks.plan import Policy
from tasks.prune import Pruned
from tasks.run import Run


@flow(name="prune", flow_run_name="prune {run} stage {stage}")
def prune(run: str, stage: int, policy: Policy | None = None) -> Pruned:
    """Prunes a trained stage; what is missing of its embeddings, index and scores is made first.

    Args:
        run: path or URL of the run's folder.
        policy: another policy than the plan's; its result stands beside the plan's own.

    Returns:
        Samples kept and dropped, and the shards.
    """
    opened = Run.open(run)
    with crew(opened.plan.workers) as workers:
        appraise(workers, opened.url, stage)
        return cut(workers, opened.url, stage, policy)

"""Prune one stage of an existing run, on request or on an event."""

from __future__ import annotations

from typing import Annotated

from prefect import flow

from secateur.flows.run_lock import exclusive_run
from secateur.flows.stage import (
    analyze_stage,
    prune_stage,
    release_checkpoints,
    report_stage,
    score_stage,
)
from secateur.flows.workers import Workers, worker_pool
from secateur.tasks.plan import POLICIES, Policy
from secateur.tasks.results.pruning_results import PruneResult, unpruned_before
from secateur.tasks.results.training_results import end_checkpoint
from secateur.tasks.run import Run


@flow(name="prune", flow_run_name="prune {run} stage {stage}")
def prune(
    run: str, stage: int, policy: Annotated[Policy, POLICIES] | None = None
) -> PruneResult | None:
    """Prune a trained stage. Missing embeddings, index and scores are made first.

    An earlier stage that the plan prunes and that is not pruned yet, because its event was lost or
    comes later, is pruned before it.

    Args:
        run: path or URL of the run's folder.
        policy: prune by another policy than the plan's. Its result has its own name.

    Returns:
        Samples kept and dropped, and the shards. None if neither plan nor caller has a policy for
        the stage.

    Raises:
        PlanError: the stage or one before it is not trained to its end.
    """
    opened = Run.open(run)
    end_checkpoint(opened, stage)
    with exclusive_run(opened), worker_pool(opened.plan.workers) as workers:
        for earlier in unpruned_before(opened, stage):
            _score(workers, opened, earlier)
            prune_stage(workers, opened.url, earlier)
            release_checkpoints(workers, opened.url, earlier)
            report_stage(workers, opened.url, earlier)
        _score(workers, opened, stage)
        result = None
        if policy is not None or opened.plan.stages[stage].prune is not None:
            result = prune_stage(workers, opened.url, stage, policy)
        release_checkpoints(workers, opened.url, stage)
        if policy is None:
            report_stage(workers, opened.url, stage)
        return result


def _score(workers: Workers, run: Run, stage: int) -> None:
    score_stage(workers, run.url, stage)
    analyze_stage(workers, run.url, stage)

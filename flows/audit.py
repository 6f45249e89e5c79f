"""Measure how far a stage's scores can be trusted, on demand."""

from __future__ import annotations

from prefect import flow

from secateur.flows.run_lock import exclusive_run
from secateur.flows.stage import analyze_stage, audit_stage, score_stage
from secateur.flows.workers import worker_pool
from secateur.tasks.results.audit_results import AuditResult
from secateur.tasks.run import Run


@flow(name="audit", flow_run_name="audit {run} stage {stage}")
def audit(run: str, stage: int, removals: int | None = None) -> AuditResult:
    """Retrain a stage without a few samples, one at a time, and compare with its scores.

    Args:
        run: path or URL of the run's folder.
        removals: how many samples to leave out, in place of the plan's number.
    """
    opened = Run.open(run)
    with exclusive_run(opened), worker_pool(opened.plan.workers) as workers:
        score_stage(workers, opened.url, stage)
        analyze_stage(workers, opened.url, stage)
        return audit_stage(workers, opened.url, stage, removals)

"""Room `flows`: how far a stage's scores can be trusted, on demand."""

from __future__ import annotations

from prefect import flow

from flows.alone import alone
from flows.stage import appraise, audit_stage
from flows.workers import crew
from tasks.audit import Audited
from tasks.run import Run


@flow(name="audit", flow_run_name="audit {run} stage {stage}")
def audit(run: str, stage: int, removals: int | None = None) -> Audited:
    """Retrains a stage without a few samples, one at a time, and holds its scores against what that does.

    Args:
        run: path or URL of the run's folder.
        removals: instead of the plan's.
    """
    opened = Run.open(run)
    with alone(opened), crew(opened.plan.workers) as workers:
        appraise(workers, opened.url, stage)
        return audit_stage(workers, opened.url, stage, removals)

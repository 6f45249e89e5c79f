"""Room `flows`: how far a stage's scores can be trusted, on demand."""

from __future__ import annotations

from prefect import flow

from flows.alone import alone
from flows.prune import appraise
from tasks import audit as auditing
from tasks.run import Run


@flow(name="audit", flow_run_name="audit {run} stage {stage}")
def audit(run: str, stage: int, removals: int | None = None) -> auditing.Audited:
    """Retrains a stage without a few samples, one at a time, and holds its scores against what that does.

    Args:
        run: path or URL of the run's folder.
        removals: instead of the plan's.
    """
    opened = Run.open(run)
    with alone(opened):
        appraise(opened.url, stage)
        return auditing.audit(opened.url, stage, removals)

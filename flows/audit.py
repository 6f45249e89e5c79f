"""Measure how far a stage's scores, or its answers, can be trusted, on demand."""

from __future__ import annotations

import sys

from prefect import flow

from secateur.errors import PlanError
from secateur.flows.run_lock import exclusive_run
from secateur.flows.stage import analyze_stage, audit_stage, measure_agreement, score_stage
from secateur.flows.workers import worker_pool
from secateur.tasks.reporting.dry_run import estimate_audit_cost
from secateur.tasks.results.agreement_results import AgreementResult
from secateur.tasks.results.audit_results import AuditResult
from secateur.tasks.run import Run


@flow(name="audit", flow_run_name="audit {run} stage {stage}")
def audit(
    run: str, stage: int, removals: int | None = None, questions: int | None = None
) -> AuditResult | AgreementResult:
    """Measure how far a stage's scores can be trusted, or with `questions` its answers.

    Scores are compared with retraining without a few samples, one at a time, and answers about
    single target samples with replay, which needs no retraining.

    Args:
        run: path or URL of the run's folder.
        removals: how many samples to leave out, in place of the plan's number.
        questions: how many target samples to ask about.

    Raises:
        PlanError: both are given.
    """
    if removals is not None and questions is not None:
        raise PlanError(
            "an audit either retrains without samples or asks questions; give one of --removals "
            "and --questions"
        )
    opened = Run.open(run)
    cost = estimate_audit_cost(opened, stage, removals, questions)
    print(f"the audit costs about {cost:.1f} trainings of stage {stage}", file=sys.stderr)
    with exclusive_run(opened), worker_pool(opened.plan.workers) as workers:
        score_stage(workers, opened.url, stage)
        if questions is not None:
            return measure_agreement(workers, opened.url, stage, questions)
        analyze_stage(workers, opened.url, stage)
        return audit_stage(workers, opened.url, stage, removals)

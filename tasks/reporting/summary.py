"""Summarize a run, stage by stage."""

from __future__ import annotations

from pydantic import BaseModel

from secateur.storage.layout import PLAN_PRUNING
from secateur.tasks.results.agreement_results import AgreementResult, find_agreement
from secateur.tasks.results.audit_results import AuditResult, read_audit
from secateur.tasks.results.pruning_results import PruneResult, read_prune_result
from secateur.tasks.results.training_results import count_selected
from secateur.tasks.run import Run


class StageSummary(BaseModel):
    """The summary of a stage.

    Attributes:
        skipped: a sentence about each damaged shard that was left out.
        candidates: samples that online selection looked at.
        chosen: samples that it chose.
        targets: every target's mean loss and metrics at the stage's end.
        pruned: the result of pruning by the plan's own policy, or None.
        agreement: how far its answers agree with replay, or None if the plan asks no questions.
        audited: the result of its audit, or None if the plan does not have it audited.
    """

    stage: int
    samples: int
    skipped: list[str]
    candidates: int
    chosen: int
    targets: dict[str, dict[str, float]]
    pruned: PruneResult | None
    agreement: AgreementResult | None
    audited: AuditResult | None


def summarize_run(run: Run) -> list[StageSummary]:
    """Summarize every stage that is trained and scored so far."""
    summaries = []
    for stage in range(len(run.plan.stages)):
        folder = run.folder.stage(stage)
        if not (folder.samples.committed and folder.scores.committed):
            break
        summaries.append(summarize_stage(run, stage))
    return summaries


def summarize_stage(run: Run, stage: int) -> StageSummary:
    """Summarize a stage that is trained and scored."""
    folder = run.folder.stage(stage)
    is_pruned = folder.prune(PLAN_PRUNING).committed
    return StageSummary(
        stage=stage,
        samples=int(folder.samples.manifest.facts["samples"]),
        skipped=folder.samples.manifest.facts["skipped"],
        **count_selected(folder),
        targets=folder.targets.manifest.facts,
        pruned=read_prune_result(run, stage) if is_pruned else None,
        agreement=find_agreement(run, stage),
        audited=read_audit(run, stage) if run.plan.audits(stage) else None,
    )

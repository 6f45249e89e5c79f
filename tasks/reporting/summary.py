"""Room `tasks`: what a run came to, stage by stage."""

from __future__ import annotations

from pydantic import BaseModel

from secateur.tasks.analysis.audit import AuditResult, is_audited, read_audit
from secateur.tasks.pruning.prune import PLAN_PRUNING, PruneResult, read_prune_result
from secateur.tasks.run.run import Run
from secateur.tasks.training.online_selection import count_selected


class StageSummary(BaseModel):
    """One stage: the damaged shards that were left out, the candidates of online selection and how many were chosen, what
    pruning came to, if it was pruned, every target's mean figures at the stage's end, and its audit if the plan has it
    audited."""

    stage: int
    samples: int
    skipped: list[str]
    candidates: int
    chosen: int
    targets: dict[str, dict[str, float]]
    pruned: PruneResult | None
    audited: AuditResult | None


def summarize_run(run_url: str) -> list[StageSummary]:
    """Every stage that has been trained and judged so far."""
    run, found = Run.open(run_url), []
    for stage in range(len(run.plan.stages)):
        folder = run.folder.stage(stage)
        if not (folder.samples.committed and folder.scores.committed):
            break
        found.append(summarize_stage(run, stage))
    return found


def summarize_stage(run: Run, stage: int) -> StageSummary:
    """A stage that has been trained and judged."""
    folder = run.folder.stage(stage)
    own = folder.prune(PLAN_PRUNING)
    return StageSummary(
        stage=stage,
        samples=int(folder.samples.manifest.facts["samples"]),
        skipped=folder.samples.manifest.facts["skipped"],
        **count_selected(folder),
        targets=folder.targets.manifest.facts,
        pruned=read_prune_result(own, stage, PLAN_PRUNING) if own.committed else None,
        audited=read_audit(run, stage) if is_audited(run.plan, stage) else None,
    )

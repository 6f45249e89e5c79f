"""Room `tasks`: what a run came to, stage by stage."""

from __future__ import annotations

from pydantic import BaseModel

from tasks.audit import Audited, audited, wanted
from tasks.prune import OWN, Pruned, pruned
from tasks.run import Run
from tasks.select import selected


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
    pruned: Pruned | None
    audited: Audited | None


def summarise(run_url: str) -> list[StageSummary]:
    """Every stage that has been trained and judged so far."""
    run, found = Run.open(run_url), []
    for stage in range(len(run.plan.stages)):
        folder = run.folder.stage(stage)
        if not (folder.samples.committed and folder.scores.committed):
            break
        found.append(summary_of(run, stage))
    return found


def summary_of(run: Run, stage: int) -> StageSummary:
    """A stage that has been trained and judged."""
    folder = run.folder.stage(stage)
    own = folder.prune(OWN)
    return StageSummary(
        stage=stage,
        samples=int(folder.samples.manifest.facts["samples"]),
        skipped=folder.samples.manifest.facts["skipped"],
        **selected(folder),
        targets=folder.targets.manifest.facts,
        pruned=pruned(own, stage, OWN) if own.committed else None,
        audited=audited(run, stage) if wanted(run.plan, stage) else None,
    )

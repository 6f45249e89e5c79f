"""Room `tasks`: what a run came to, stage by stage."""

from __future__ import annotations

from pydantic import BaseModel

from tasks.prune import OWN, Pruned, pruned
from tasks.run import Run


class StageSummary(BaseModel):
    """One stage: what pruning came to, if it was pruned, and every target's mean figures at the stage's end."""

    stage: int
    samples: int
    targets: dict[str, dict[str, float]]
    pruned: Pruned | None


def summarise(run_url: str) -> list[StageSummary]:
    """Every stage that has been trained and judged so far."""
    run, found = Run.open(run_url), []
    for stage in range(len(run.plan.stages)):
        folder = run.folder.stage(stage)
        if not (folder.samples.committed and folder.targets.committed):
            break
        own = folder.prune(OWN)
        found.append(
            StageSummary(
                stage=stage,
                samples=int(folder.samples.manifest.facts["samples"]),
                targets=folder.targets.manifest.facts,
                pruned=pruned(own, stage, OWN) if own.committed else None,
            )
        )
    return found

"""Removal of the checkpoints within a stage, if the plan keeps those at stage ends only."""

from __future__ import annotations

from secateur.storage.layout import PLAN_PRUNING
from secateur.storage.ledger import CHECKPOINT
from secateur.tasks.results.audit_results import audit_output
from secateur.tasks.run import Run


def remove_checkpoint_before(run: Run, stage: int, number: int) -> None:
    """Remove the checkpoint that a segment started from, once the segment is committed.

    The stage's start stays, and so does a checkpoint that the plan reads later.
    """
    if number and _may_remove(run, stage):
        run.folder.stage(stage).segment(number - 1).remove_file(CHECKPOINT)


def remove_checkpoints(run: Run, stage: int) -> None:
    """Remove the checkpoints within a stage, unless the plan keeps them or has yet to read them.

    All segments of the stage must be committed. A removal that was interrupted is finished.
    """
    if _may_remove(run, stage):
        # The first one goes first, because readers ask for it to know whether all are there.
        for segment in run.folder.stage(stage).segments()[:-1]:
            segment.remove_file(CHECKPOINT)


def _may_remove(run: Run, stage: int) -> bool:
    """Whether the plan removes checkpoints, and all that reads them is made."""
    plan = run.plan
    if plan.checkpoints.keep == "segments":
        return False
    folder = run.folder.stage(stage)
    policy = plan.stages[stage].prune
    return (
        (plan.estimate != "replay" or folder.scores.committed)
        and (not plan.audits(stage) or audit_output(run, stage).committed)
        and (not plan.trust.asked or folder.agreement.committed)
        and (policy is None or not policy.reads_checkpoints or folder.prune(PLAN_PRUNING).committed)
    )

"""Find the groups of samples that helped or harmed most, on demand."""

from __future__ import annotations

from prefect import flow

from secateur.flows import pipeline_tasks, run_artifacts
from secateur.tasks.analysis.groups import SampleGroup


@flow(name="groups", flow_run_name="groups {run} by {by}")
def groups(
    run: str,
    by: str,
    stage: int | None = None,
    target: str | None = None,
    top: int = 10,
    harmful: bool = False,
    estimate: str = "embedding",
    removals: int = 0,
    similarity: float | None = None,
) -> list[SampleGroup]:
    """Return the groups of a stage's samples that most lowered a target's loss at its end.

    Args:
        run: path or URL of the run's folder.
        by: `shard`, `duplicates`, a member such as `cls`, or `member:field` of a JSON member.
        stage: the last indexed one if None.
        target: the one pruned for if None.
        harmful: return the groups that most raised the loss.
        estimate: `embedding`, `pull_back` through the ledgers, or `replay` of the training.
        removals: how many of the groups to leave out in real training, one at a time.
        similarity: least similarity of duplicates.
    """
    valued = pipeline_tasks.value_groups(
        run, by, stage, target, top, harmful, estimate, removals, similarity
    )
    run_artifacts.post_groups(run, valued)
    return valued

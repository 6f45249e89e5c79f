"""The value of whole groups of samples: labels, domains, shards, copies."""

from __future__ import annotations

import hashlib

import numpy as np
import polars as pl
import torch
from pydantic import BaseModel

from secateur.errors import PlanError
from secateur.tasks.analysis.grouped_uses import DUPLICATES, count_decisions, grouped_uses
from secateur.tasks.analysis.retraining import Retraining
from secateur.tasks.engine.progress import track
from secateur.tasks.results.training_results import check_replayable
from secateur.tasks.run import Run
from secateur.tasks.valuation.copies import SIMILARITY
from secateur.tasks.valuation.query import ESTIMATES, indexed_stages
from secateur.tasks.valuation.stage_effects import stage_effects


class SampleGroup(BaseModel):
    """A group of a stage's samples, and what it did to a target's loss at the stage's end.

    Attributes:
        group: its name; of copies, the key of the first one.
        samples: how many samples it has.
        uses: how many of their uses are recorded.
        score: the sum of the scores of these uses. It predicts how much the loss would rise without
            them if effects added up.
        mean: the score per sample that is used.
        removal: how much the loss rose when the stage was trained again without these uses.
        kept: how many of the samples the plan's pruning kept; None if the stage is not pruned.
        dropped: how many it dropped.
        members: the score of each copy, by its key; empty for other groups.
    """

    rank: int
    group: str
    samples: int
    uses: int
    score: float
    mean: float
    removal: float | None = None
    kept: int | None = None
    dropped: int | None = None
    members: dict[str, float] = {}


def value_groups(
    run: Run,
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

    The loss is the mean over those target samples that score training samples.

    Args:
        by: what they have in common: `shard`, `duplicates` (they are copies of one another), a
            member such as `cls`, or a field of a JSON member as `member:field`.
        stage: the stage; the last indexed one if None.
        target: the name of the target; the one pruned for if None.
        top: how many groups.
        harmful: return the groups that most raised the loss.
        estimate: of the scores, as in a query.
        removals: how many of the groups to leave out in real training, one at a time. Each costs up
            to one training of the stage, and is stored.
        similarity: of `duplicates`, see `find_copies`; its default if None.

    Raises:
        PlanError: an argument is not possible, the stage is not indexed, a sample lacks the member,
            or training cannot be repeated.
    """
    stage = indexed_stages(run, stage)[-1] if stage is None else stage
    target = target or run.plan.pruning_target
    _check_arguments(run, by, stage, target, top, estimate, removals, similarity)
    uses = grouped_uses(run, stage, by, SIMILARITY if similarity is None else similarity)
    if uses.is_empty():
        return []
    effects = stage_effects(run, stage, target, estimate).double().numpy()
    uses = uses.with_columns(score=pl.Series(effects[uses["row"].to_numpy()], dtype=pl.Float64))
    values = _sum_scores(uses).sort("score", "group", descending=[not harmful, False]).head(top)
    rows = values.join(count_decisions(run, stage, uses), "group", "left", maintain_order="left")
    groups = [SampleGroup(rank=n, **row) for n, row in enumerate(rows.iter_rows(named=True), 1)]
    if by == DUPLICATES:
        _add_members(groups, uses)
    _add_removals(run, stage, target, uses, groups[:removals])
    return groups


def _check_arguments(
    run: Run,
    by: str,
    stage: int,
    target: str,
    top: int,
    estimate: str,
    removals: int,
    similarity: float | None,
) -> None:
    """Refuse what cannot be done, before any work.

    Raises:
        PlanError: an argument is not possible, or training cannot be repeated.
    """
    indexed_stages(run, stage)
    if target not in run.plan.targets:
        known = ", ".join(run.plan.targets)
        raise PlanError(f"{run.url} has no target {target}; it has {known}")
    if estimate not in ESTIMATES:
        raise PlanError(f"--estimate is {estimate}; give one of {', '.join(ESTIMATES)}")
    if top < 1:
        raise PlanError(f"--top is {top}; ask for at least one group")
    if not 0 <= removals <= top:
        raise PlanError(
            f"--removals is {removals}; give a number from 0 to the {top} groups of --top"
        )
    if similarity is not None and by != DUPLICATES:
        raise PlanError(f"--similarity is for --by {DUPLICATES}; leave it out with --by {by}")
    if removals:
        check_replayable(run, stage)


def _sum_scores(uses: pl.DataFrame) -> pl.DataFrame:
    """One row per group: how many samples and uses it has, and what they sum up to."""
    total = pl.col("score").sum()
    return uses.group_by("group", maintain_order=True).agg(
        pl.col("samples").first(),
        pl.len().alias("uses"),
        total,
        (total / pl.col("sample").n_unique()).alias("mean"),
    )


def _add_members(groups: list[SampleGroup], uses: pl.DataFrame) -> None:
    """Add the score of every member to groups of copies."""
    for group in groups:
        own = uses.filter(pl.col("group") == group.group)
        scores = own.group_by("key", maintain_order=True).agg(pl.col("score").sum())
        group.members = dict(sorted(scores.iter_rows()))


def _add_removals(
    run: Run, stage: int, target: str, uses: pl.DataFrame, groups: list[SampleGroup]
) -> None:
    """Train the stage again without each of some groups, and add what that does to the loss."""
    if not groups:
        return
    retraining = Retraining(run, stage, target)
    base = retraining.loss_with_all_samples()
    for group in track(groups, f"stage {stage}, retraining without a group", len(groups)):
        own = uses.filter(pl.col("group") == group.group).sort("step", "sample")
        left_out = own.select("step", "sample").to_numpy().astype(np.int64)
        # Other ways to group may give the same group, and names may be of any length.
        digest = hashlib.sha256(target.encode() + left_out.tobytes()).hexdigest()[:16]
        by_step = {
            int(step): torch.from_numpy(left_out[left_out[:, 0] == step, 1])
            for step in np.unique(left_out[:, 0])
        }
        output = run.folder.stage(stage).group_removal(digest)
        group.removal = retraining.loss_without(by_step, output) - base

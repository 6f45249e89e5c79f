"""Which recorded uses belong to which group of samples, and what pruning decided on the groups."""

from __future__ import annotations

import polars as pl

from secateur.storage.layout import PLAN_PRUNING
from secateur.tasks.data.groups import read_group_names
from secateur.tasks.data.samples import read_stage_samples
from secateur.tasks.results.pruning_results import read_decisions
from secateur.tasks.results.valuation_results import read_scores
from secateur.tasks.run import Run
from secateur.tasks.valuation.copies import find_copies

DUPLICATES, SHARD = "duplicates", "shard"


def grouped_uses(run: Run, stage: int, by: str, similarity: float) -> pl.DataFrame:
    """Return the recorded uses of grouped samples, in the order of `scores.parquet`.

    Args:
        by: what groups have in common, as in `value_groups`.
        similarity: of `duplicates`, see `find_copies`.

    Returns:
        `row` (among all uses), `sample`, `key`, `step`, `group` (its name), and `samples`: how many
        samples the group has, used or not.

    Raises:
        PlanError: a sample lacks the member, or the similarity is none.
    """
    samples = read_stage_samples(run, stage)
    if by == DUPLICATES:
        copies = find_copies(run, stage, similarity)
        keys = samples.frame.select(group="sample", name="key")
        grouped = copies.join(keys, "group", "left", maintain_order="left")
        grouped = grouped.select("sample", group="name")
    else:
        rows = samples.frame["sample"].to_list()
        if by == SHARD:
            names = [samples.urls[shard] for shard in samples.frame["shard"]]
        else:
            names = read_group_names(samples, by, rows)
        grouped = samples.frame.select("sample", group=pl.Series(names, dtype=pl.String))
    grouped = grouped.with_columns(samples=pl.len().over("group"))
    uses = read_scores(run, stage).select("sample", "key", "step").with_row_index("row")
    return uses.join(grouped, "sample", maintain_order="left")


def count_decisions(run: Run, stage: int, uses: pl.DataFrame) -> pl.DataFrame:
    """Return how many samples of each group the plan's pruning `kept` and `dropped`.

    Both columns are absent if the stage is not pruned.

    Args:
        uses: as `grouped_uses` returns them.
    """
    members = uses.select("group", "sample", "samples").unique(maintain_order=True)
    if not run.folder.stage(stage).prune(PLAN_PRUNING).committed:
        return members.select("group").unique(maintain_order=True)
    # A sample that no window used is kept, so only those with uses can be dropped.
    keep = read_decisions(run, stage).select("sample", "keep")
    dropped = (~pl.col("keep")).sum()
    decided = members.join(keep, "sample", maintain_order="left")
    return decided.group_by("group", maintain_order=True).agg(
        (pl.col("samples").first() - dropped).alias("kept"), dropped.alias("dropped")
    )

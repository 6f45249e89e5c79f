"""Read what pruning a stage decided and wrote."""

from __future__ import annotations

from typing import Any

import polars as pl
from pydantic import BaseModel

from secateur.storage.frames import read_frame
from secateur.storage.layout import PLAN_PRUNING
from secateur.tasks.data.samples import shard_names
from secateur.tasks.run import Run

DECISIONS = "decisions.parquet"


class PruneResult(BaseModel):
    """The result of pruning a stage.

    Attributes:
        name: `plan` for the plan's own policy, else the policy and its settings.
        reasons: how many samples were dropped for each reason.
        trust: the figures of each trust gate, and whether it holds.
        shards: paths or URLs of the pruned shards.
    """

    stage: int
    name: str
    samples: int
    kept: int
    dropped: int
    reasons: dict[str, int]
    trust: dict[str, Any]
    shards: list[str]


def read_prune_result(run: Run, stage: int, name: str = PLAN_PRUNING) -> PruneResult:
    """Return the result of a committed pruning."""
    pruning = run.folder.stage(stage).prune(name)
    keys = ("samples", "kept", "dropped", "reasons", "trust")
    facts = {key: pruning.manifest.facts[key] for key in keys}
    shards = [pruning.url(shard) for shard in shard_names(pruning)]
    return PruneResult(stage=stage, name=name, shards=shards, **facts)


def read_decisions(run: Run, stage: int) -> pl.DataFrame:
    """Return the decisions of the plan's own policy, one row per sample of the stage."""
    return read_frame(run.folder.stage(stage).prune(PLAN_PRUNING), DECISIONS)


def unpruned_before(run: Run, stage: int) -> list[int]:
    """Return the earlier stages that the plan prunes and that are not pruned yet."""
    planned = [number for number in range(stage) if run.plan.stages[number].prune is not None]
    return [n for n in planned if not run.folder.stage(n).prune(PLAN_PRUNING).committed]

"""Room `tasks`: pruning a stage: decisions, and the shards that they leave, committed together."""

from __future__ import annotations

from typing import Any

import polars as pl
from prefect import task
from pydantic import BaseModel, TypeAdapter

from storage.frames import read_frame, write_frame
from storage.manifest import Artefact
from storage.rewrite import rewrite_shards
from tasks.decide import counts, decide
from tasks.errors import PlanError
from tasks.plan import Policy
from tasks.run import Run
from tasks.samples import stage_samples
from tasks.score import stage_scores
from tasks.trust import apply, verdict

DECISIONS = "decisions.parquet"
DROPPED = "dropped.txt"
OWN = "plan"


class Pruned(BaseModel):
    """What pruning a stage came to."""

    stage: int
    name: str
    samples: int
    kept: int
    dropped: int
    reasons: dict[str, int]
    trust: dict[str, Any]
    shards: list[str]


@task(name="prune")
def prune_stage(run_url: str, stage: int, policy: dict[str, Any] | None = None) -> Pruned:
    """Decides which of a stage's samples stay and writes the shards of the next stage, and the dropped keys.

    Args:
        policy: another policy than the plan's; its result stands beside the plan's own, under a name of its own.

    Raises:
        PlanError: the plan has no policy for the stage, or a trust gate does not hold and the plan says to fail.
    """
    run = Run.open(run_url)
    chosen: Policy | None = TypeAdapter(Policy).validate_python(policy) if policy else run.plan.stages[stage].prune
    if chosen is None:
        raise PlanError(f"stage {stage} of the plan has no `prune`; name a policy")
    artefact = run.folder.stage(stage).prune(name_of(run, stage, chosen))
    if not artefact.committed:
        samples = stage_samples(run, stage)
        gates = verdict(run, stage, name_of(run, stage, chosen))
        decisions = apply(run, stage, decide(run.plan, stage, chosen, stage_scores(run, stage), samples), gates)
        inputs = {"scores": run.folder.stage(stage).scores.fingerprint}
        with artefact.attempt("prune", inputs) as attempt:
            write_frame(attempt, DECISIONS, decisions)
            dropped = decisions.filter(~pl.col("keep"))
            attempt.write(
                DROPPED, "".join(f"{k}\t{r}\n" for k, r in dropped.select("key", "reason").iter_rows()).encode()
            )
            rewrite_shards(attempt, samples.urls, samples.frame, decisions["keep"].to_numpy())
            attempt.facts.update(counts(decisions), policy=chosen.model_dump(mode="json"), trust=gates)
    return pruned(artefact, stage, name_of(run, stage, chosen))


def pruned(artefact: Artefact, stage: int, name: str) -> Pruned:
    """The record of a committed pruning."""
    facts = {k: artefact.manifest.facts[k] for k in ("samples", "kept", "dropped", "reasons", "trust")}
    shards = [artefact.url(n) for n in artefact.names() if n.startswith("shards/")]
    return Pruned(stage=stage, name=name, shards=shards, **facts)


def name_of(run: Run, stage: int, policy: Policy) -> str:
    """Folder of a policy's result: `plan` for the plan's own, else the policy and its settings."""
    if policy == run.plan.stages[stage].prune:
        return OWN
    settings = policy.model_dump(mode="json")
    return "-".join(str(value).replace("/", "_").replace(":", "_") for value in settings.values())


def unpruned_before(run: Run, stage: int) -> list[int]:
    """Earlier stages that the plan prunes and that nobody has pruned yet."""
    planned = [number for number in range(stage) if run.plan.stages[number].prune is not None]
    return [number for number in planned if not run.folder.stage(number).prune(OWN).committed]


def stage_decisions(run: Run, stage: int) -> pl.DataFrame:
    """The decisions of the plan's own policy."""
    return read_frame(run.folder.stage(stage).prune(OWN), DECISIONS)

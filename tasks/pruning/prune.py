"""Room `tasks`: pruning a stage: decisions, and the shards that they leave, committed together."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import polars as pl
from pydantic import BaseModel, TypeAdapter

from secateur.errors import PlanError, StorageError
from secateur.storage.frames import read_frame, write_frame
from secateur.storage.integrity import list_outputs
from secateur.storage.outputs import Output
from secateur.storage.rewrite import rewrite_shard as rewritten
from secateur.tasks.data.samples import read_stage_samples
from secateur.tasks.engine.prefect_task import pipeline_task
from secateur.tasks.engine.progress import track
from secateur.tasks.plan import Policy
from secateur.tasks.pruning.decide import count_decisions, decide_samples
from secateur.tasks.pruning.gates import apply_gates, evaluate_gates
from secateur.tasks.run.run import Run
from secateur.tasks.valuation.tracin import read_policy_scores

DECISIONS = "decisions.parquet"
DROPPED = "dropped.txt"
PLAN_PRUNING = "plan"


class PruneResult(BaseModel):
    """What pruning a stage came to."""

    stage: int
    name: str
    samples: int
    kept: int
    dropped: int
    reasons: dict[str, int]
    trust: dict[str, Any]
    shards: list[str]


@pipeline_task(
    "decide",
    makes=lambda run, stage, policy: run.folder.stage(stage).decided(
        pruning_name(run, stage, policy)
    ),
)
def decide_stage(run_url: str, stage: int, policy: dict[str, Any] | None = None) -> int:
    """Decides which of a stage's samples stay, for `rewrite_shard` to carry out; see `prune_stage`.

    Returns:
        Number of shards to rewrite.
    """
    run = Run.open(run_url)
    chosen, name = resolve_policy(run, stage, policy), pruning_name(run, stage, policy)
    artefact, samples = run.folder.stage(stage).decided(name), read_stage_samples(run, stage)
    inputs = {"scores": run.folder.stage(stage).scores.fingerprint}
    if artefact.committed and artefact.manifest.inputs != inputs:
        artefact.remove()
    if not artefact.committed:
        gates = evaluate_gates(run, stage, name)
        ruled = decide_samples(
            run.plan, stage, chosen, read_policy_scores(run, stage, chosen), samples
        )
        decisions = apply_gates(run, stage, ruled, gates)
        with artefact.attempt("decisions", inputs) as attempt:
            write_frame(attempt, DECISIONS, decisions)
            dropped = decisions.filter(~pl.col("keep")).select("key", "reason").iter_rows()
            attempt.write(
                DROPPED, "".join(f"{key}\t{reason}\n" for key, reason in dropped).encode()
            )
            attempt.facts.update(
                count_decisions(decisions), policy=chosen.model_dump(mode="json"), trust=gates
            )
    return len(samples.urls)


@pipeline_task("rewrite shard")
def rewrite_shard(run_url: str, stage: int, name: str, number: int) -> None:
    """Writes what is kept of one of a stage's shards, under the name of its pruning. Shards may be written side by side."""
    run = Run.open(run_url)
    folder = run.folder.stage(stage)
    artefact = folder.rewritten(name, number)
    with ignore_if_committed_elsewhere(folder.prune(name)):
        inputs = {"decisions": folder.decided(name).fingerprint}
        if artefact.committed and artefact.manifest.inputs != inputs:
            artefact.remove()
        if not artefact.committed:
            samples, decisions = (
                read_stage_samples(run, stage),
                read_frame(folder.decided(name), DECISIONS),
            )
            with artefact.attempt("shard", inputs) as attempt:
                rewritten(
                    attempt, samples.urls, number, samples.frame, decisions["keep"].to_numpy()
                )


@pipeline_task(
    "prune",
    makes=lambda run, stage, policy: run.folder.stage(stage).prune(
        pruning_name(run, stage, policy)
    ),
)
def write_pruned_stage(
    run_url: str, stage: int, policy: dict[str, Any] | None = None
) -> PruneResult:
    """Decides which of a stage's samples stay and writes the shards of the next stage, and the dropped keys; decisions and
    shards that are there already are taken as they are.

    Args:
        policy: another policy than the plan's; its result stands beside the plan's own, under a name of its own.

    Raises:
        PlanError: the plan has no policy for the stage, or a trust gate does not hold and the plan says to fail.
    """
    run = Run.open(run_url)
    folder, name = run.folder.stage(stage), pruning_name(run, stage, policy)
    artefact, decided = folder.prune(name), folder.decided(name)
    if not artefact.committed:
        count = decide_stage.fn(run_url, stage, policy)
        for number in track(range(count), f"stage {stage}, rewriting shards", count):
            rewrite_shard.fn(run_url, stage, name, number)
        with (
            ignore_if_committed_elsewhere(artefact),
            artefact.attempt("prune", decided.manifest.inputs) as attempt,
        ):
            for part in (decided, *(folder.rewritten(name, number) for number in range(count))):
                attempt.link_files(part)
            attempt.facts.update(decided.manifest.facts)
    for part in (*list_outputs(folder.root.child("rewritten", name)), *list_outputs(decided.root)):
        part.remove()
    return read_prune_result(artefact, stage, name)


@contextmanager
def ignore_if_committed_elsewhere(whole: Output) -> Iterator[None]:
    """Lets a part go missing once the whole is there: another process that did the same has come first."""
    try:
        yield
    except StorageError:
        if not whole.committed:
            raise


def read_prune_result(artefact: Output, stage: int, name: str) -> PruneResult:
    """The record of a committed pruning."""
    facts = {
        k: artefact.manifest.facts[k] for k in ("samples", "kept", "dropped", "reasons", "trust")
    }
    shards = [artefact.url(n) for n in artefact.names() if n.startswith("shards/")]
    return PruneResult(stage=stage, name=name, shards=shards, **facts)


def resolve_policy(run: Run, stage: int, policy: dict[str, Any] | None) -> Policy:
    """The policy that is asked for: one that was given, or the plan's.

    Raises:
        PlanError: the plan has none for the stage.
    """
    chosen: Policy | None = (
        TypeAdapter(Policy).validate_python(policy) if policy else run.plan.stages[stage].prune
    )
    if chosen is None:
        raise PlanError(f"stage {stage} of the plan has no `prune`; name a policy")
    return chosen


def pruning_name(run: Run, stage: int, policy: dict[str, Any] | None) -> str:
    """Folder of a policy's result: `plan` for the plan's own, else the policy and its settings."""
    chosen = resolve_policy(run, stage, policy)
    if chosen == run.plan.stages[stage].prune:
        return PLAN_PRUNING
    settings = chosen.model_dump(mode="json")
    return "-".join(str(value).replace("/", "_").replace(":", "_") for value in settings.values())


def unpruned_before(run: Run, stage: int) -> list[int]:
    """Earlier stages that the plan prunes and that nobody has pruned yet."""
    planned = [number for number in range(stage) if run.plan.stages[number].prune is not None]
    return [
        number for number in planned if not run.folder.stage(number).prune(PLAN_PRUNING).committed
    ]


def read_decisions(run: Run, stage: int) -> pl.DataFrame:
    """The decisions of the plan's own policy."""
    return read_frame(run.folder.stage(stage).prune(PLAN_PRUNING), DECISIONS)

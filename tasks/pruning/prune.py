"""Prune a stage: commit the decisions together with the shards of the next stage."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import polars as pl

from secateur.errors import StorageError
from secateur.storage import schemas
from secateur.storage.attempt import Attempt
from secateur.storage.frames import read_frame, write_frame
from secateur.storage.layout import PLAN_PRUNING
from secateur.storage.outputs import Output, list_outputs
from secateur.storage.rewrite import rewrite_shard
from secateur.tasks.data.samples import read_stage_samples
from secateur.tasks.engine.progress import track
from secateur.tasks.plan import Policy
from secateur.tasks.pruning.context import PruningContext
from secateur.tasks.pruning.decide import count_decisions, decide_samples, resolve_policy
from secateur.tasks.pruning.gates import apply_gates, evaluate_gates
from secateur.tasks.results.pruning_results import DECISIONS, PruneResult, read_prune_result
from secateur.tasks.run import Run

DROPPED = "dropped.txt"


def decide_stage(run: Run, stage: int, policy: Policy | None = None) -> int:
    """Decide which of a stage's samples are kept. `rewrite_kept_shard` then writes the shards.

    Args:
        policy: as for `write_pruned_stage`.

    Returns:
        Number of shards to rewrite.
    """
    resolved = resolve_policy(run, stage, policy)
    name = pruning_name(run, stage, policy)
    folder = run.folder.stage(stage)
    context = PruningContext.of_stage(run, stage)

    def write(attempt: Attempt) -> None:
        gates = evaluate_gates(run, stage, name)
        decisions = apply_gates(run, stage, decide_samples(resolved, context), gates)
        write_frame(attempt, DECISIONS, decisions, schemas.DECISIONS)
        dropped = decisions.filter(~pl.col("keep")).select("key", "reason").iter_rows()
        attempt.write(DROPPED, "".join(f"{key}\t{reason}\n" for key, reason in dropped).encode())
        settings = resolved.model_dump(mode="json")
        attempt.facts.update(count_decisions(decisions), policy=settings, trust=gates)

    inputs = {"scores": folder.scores.fingerprint}
    _remove_if_stale(folder.decided(name), inputs)
    folder.decided(name).write_once("decisions", inputs, write)
    return len(context.samples.urls)


def rewrite_kept_shard(run: Run, stage: int, name: str, number: int) -> None:
    """Write the kept samples of one of a stage's shards. Shards may be written in parallel.

    Args:
        name: the pruning's name.
        number: the shard's place among the stage's shards.
    """
    folder = run.folder.stage(stage)
    output = folder.rewritten(name, number)

    def write(attempt: Attempt) -> None:
        samples = read_stage_samples(run, stage)
        keep = read_frame(folder.decided(name), DECISIONS)["keep"].to_numpy()
        rewrite_shard(attempt, samples.urls, number, samples.frame, keep)

    with ignore_if_committed_elsewhere(folder.prune(name)):
        inputs = {"decisions": folder.decided(name).fingerprint}
        _remove_if_stale(output, inputs)
        output.write_once("shard", inputs, write)


def write_pruned_stage(run: Run, stage: int, policy: Policy | None = None) -> PruneResult:
    """Write the shards of the next stage, the decisions and the list of dropped keys.

    Decisions and shards that an earlier call has written are reused.

    Args:
        policy: prune by another policy than the plan's. Its result has its own name, and the plan's
            own pruning is not changed.

    Raises:
        PlanError: the plan has no policy for the stage, or a trust gate does not hold and the plan
            says to fail.
    """
    folder = run.folder.stage(stage)
    name = pruning_name(run, stage, policy)
    pruning = folder.prune(name)
    if not pruning.committed:
        count = decide_stage(run, stage, policy)
        for number in track(range(count), f"stage {stage}, rewriting shards", count):
            rewrite_kept_shard(run, stage, name, number)
        decided = folder.decided(name)
        parts = [decided, *(folder.rewritten(name, number) for number in range(count))]
        with (
            ignore_if_committed_elsewhere(pruning),
            pruning.attempt("prune", decided.manifest.inputs) as attempt,
        ):
            for part in parts:
                attempt.link_files(part)
            attempt.facts.update(decided.manifest.facts)
    _remove_parts(run, stage, name)
    return read_prune_result(run, stage, name)


@contextmanager
def ignore_if_committed_elsewhere(pruning: Output) -> Iterator[None]:
    """Ignore that a part is missing if another process has committed the whole pruning.

    The parts are the decisions and the single shards. That process removes them once they are
    together in the pruning's output.
    """
    try:
        yield
    except StorageError:
        if not pruning.committed:
            raise


def pruning_name(run: Run, stage: int, policy: Policy | None = None) -> str:
    """Return the name of a pruning: `plan` for the plan's own, else the policy and its settings."""
    resolved = resolve_policy(run, stage, policy)
    if resolved == run.plan.stages[stage].prune:
        return PLAN_PRUNING
    settings = resolved.model_dump(mode="json")
    return "-".join(str(value).replace("/", "_").replace(":", "_") for value in settings.values())


def _remove_if_stale(output: Output, inputs: dict[str, str]) -> None:
    """Remove a part that was made from other inputs than it would be made from now."""
    if output.committed and output.manifest.inputs != inputs:
        output.remove()


def _remove_parts(run: Run, stage: int, name: str) -> None:
    folder = run.folder.stage(stage)
    rewritten = list_outputs(folder.root.child("rewritten", name))
    for part in (*rewritten, *list_outputs(folder.decided(name).root)):
        part.remove()

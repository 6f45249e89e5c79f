"""Room `tasks`: listing the samples of a stage: the plan's shards for the first, pruned ones for the next."""

from __future__ import annotations

from collections.abc import Callable

import polars as pl
import torch
from torch import Tensor

from secateur.errors import PlanError, StorageError
from secateur.storage.frames import read_frame, write_frame
from secateur.storage.integrity import check_output_file
from secateur.storage.outputs import Output
from secateur.storage.shards import Samples, expand_shard_urls, list_shards
from secateur.tasks.data.batches import seed_for
from secateur.tasks.engine.prefect_task import pipeline_task
from secateur.tasks.engine.progress import print_status
from secateur.tasks.plan import DataConfig, Plan
from secateur.tasks.run.run import Run


@pipeline_task("list samples", makes=lambda run, stage: run.folder.stage(stage).samples)
def list_stage_samples(run_url: str, stage: int) -> int:
    """Indexes the stage's shards once: key, shard, place of every member.

    Returns:
        How many samples there are.

    Raises:
        PlanError: there are none.
        StorageError: a shard is missing, truncated, or repeats a key; a pruned one holds what was never listed.
    """
    run = Run.open(run_url)
    artefact = run.folder.stage(stage).samples
    if not artefact.committed:
        urls, skipped = stage_shard_urls(run, stage), list[str]()
        frame = list_shards(urls, damaged_shard_handler(run.plan.data, skipped))
        if not len(frame):
            raise PlanError(
                f"there are no samples to train on in {', '.join(urls)}; give shards that hold some"
            )
        _check_kept(run, stage, frame)
        with artefact.attempt("samples", {}) as attempt:
            write_frame(attempt, "samples.parquet", frame)
            attempt.facts.update(shards=urls, samples=len(frame), skipped=skipped)
    return len(read_stage_samples(run, stage))


def read_stage_samples(run: Run, stage: int) -> Samples:
    """The listed samples of a stage, ready to be read; pruned ones from where they are now, for they may have been removed
    and pruned again."""
    artefact, before = run.folder.stage(stage).samples, _pruned_before(run, stage)
    frame: pl.DataFrame = read_frame(artefact, "samples.parquet")
    if before is None:
        return Samples(artefact.manifest.facts["shards"], frame)
    pruned, names = _kept_shards(run, stage, before)
    return Samples([pruned.url(name) for name in names], frame)


def list_target_samples(run: Run, target: str) -> Samples:
    """The samples of a target.

    Raises:
        PlanError: it is empty.
    """
    data = run.plan.targets[target]
    urls = expand_shard_urls(data.shards)
    frame = list_shards(urls, damaged_shard_handler(data, []))
    if not len(frame):
        raise PlanError(
            f"target {target} has no samples in {', '.join(urls)}; give it shards that hold some"
        )
    return Samples(urls, frame)


def scoring_rows(plan: Plan, target: str, count: int) -> Tensor:
    """Which of a target's `count` samples score: those that do not judge."""
    return _split(plan, target, count)[1]


def held_out_rows(plan: Plan, target: str, count: int) -> Tensor:
    """Which of a target's `count` samples judge and never score; the same for every seed of the plan."""
    return _split(plan, target, count)[0]


def _split(plan: Plan, target: str, count: int) -> tuple[Tensor, Tensor]:
    """The rows that judge and the rows that score, each in order.

    Raises:
        PlanError: the target is too small to be split.
    """
    share = plan.judging(target)
    judges = round(share * count)
    if share and not 0 < judges < count:
        raise PlanError(
            f"target {target} has {count} samples, too few to keep {share:g} of them for judging; give it more, or judge by "
            f"a target of its own"
        )
    drawn = torch.randperm(
        count, generator=torch.Generator().manual_seed(seed_for("judging", target))
    )
    return drawn[:judges].sort().values, drawn[judges:].sort().values


def damaged_shard_handler(data: DataConfig, skipped: list[str]) -> Callable[[str], None] | None:
    """What the plan wants done about a damaged shard: nothing but to fail, or to add it to `skipped` and say so."""
    if data.damaged == "fail":
        return None

    def skip(sentence: str) -> None:
        skipped.append(sentence)
        print_status(f"left out: {sentence}")

    return skip


def stage_shard_urls(run: Run, stage: int) -> list[str]:
    """The shards that a stage trains on.

    Raises:
        PlanError: the stage before has not been pruned yet.
    """
    before = _pruned_before(run, stage)
    if before is None:
        return expand_shard_urls(run.plan.data.shards)
    pruned, names = _kept_shards(run, stage, before)
    for name in names:
        if what := check_output_file(pruned, name):
            raise PlanError(
                f"the pruned shard {pruned.url(name)} is {what}; restore it, or remove its folder to prune anew"
            )
    if not names:
        raise PlanError(f"stage {before} of {run.url} kept no sample; relax its policy")
    return [pruned.url(name) for name in names]


def _kept_shards(run: Run, stage: int, before: int) -> tuple[Output, list[str]]:
    """What the plan's policy wrote of the stage before, and the names of the shards in it."""
    pruned = run.folder.stage(before).prune("plan")
    if not pruned.committed:
        raise PlanError(
            f"stage {stage} of {run.url} needs the shards of stage {before}; prune that first"
        )
    return pruned, [name for name in pruned.names() if name.startswith("shards/")]


def _pruned_before(run: Run, stage: int) -> int | None:
    """The last stage before that prunes."""
    return next(
        (before for before in reversed(range(stage)) if run.plan.stages[before].prune is not None),
        None,
    )


def _check_kept(run: Run, stage: int, frame: pl.DataFrame) -> None:
    """Holds the samples of pruned shards against those that they were kept from, byte for byte, by their sha256."""
    before = _pruned_before(run, stage)
    if before is None:
        return
    listed = read_frame(run.folder.stage(before).samples, "samples.parquet", ["key", "sha256"])
    others = frame.join(listed, ["key", "sha256"], "anti", maintain_order="left")
    if len(others):
        raise StorageError(
            f"sample {others['key'][0]} of the pruned shards of stage {before} is not what stage {before} trained on ({len(others)} "
            f"such); restore the shards that it came from, and remove {run.folder.stage(before).prune('plan').root.url} to prune anew"
        )

"""List the samples of a stage and of targets, and read the lists back."""

from __future__ import annotations

from collections.abc import Callable

import polars as pl

from secateur.errors import PlanError, StorageError
from secateur.storage import schemas
from secateur.storage.attempt import Attempt
from secateur.storage.frames import read_frame, write_frame
from secateur.storage.layout import PLAN_PRUNING
from secateur.storage.outputs import Output
from secateur.storage.shard_listing import WrongShardError, list_shards
from secateur.storage.shards import Samples, expand_shard_urls
from secateur.tasks.engine.progress import print_status
from secateur.tasks.plan import DataConfig
from secateur.tasks.run import Run

SAMPLES = "samples.parquet"


def list_stage_samples(run: Run, stage: int) -> int:
    """List the stage's shards once: the key, shard and byte offsets of every sample.

    Returns:
        Number of samples.

    Raises:
        PlanError: there are none, the stage before is not pruned yet, or its shards have changed.
        StorageError: a shard is missing or truncated, repeats a key, or (if it is a pruned shard)
            holds a sample that the stage before did not train on.
    """

    def write(attempt: Attempt) -> None:
        urls = stage_shard_urls(run, stage)
        skipped: list[str] = []
        frame = _list_checked(run, stage, urls, skipped)
        if not len(frame):
            raise PlanError(
                f"there are no samples to train on in {', '.join(urls)}; give shards that hold some"
            )
        _check_kept_samples(run, stage, frame)
        write_frame(attempt, SAMPLES, frame, schemas.SAMPLES)
        attempt.facts.update(shards=urls, samples=len(frame), skipped=skipped)

    run.folder.stage(stage).samples.write_once("samples", {}, write)
    return len(read_stage_samples(run, stage))


def read_stage_samples(run: Run, stage: int) -> Samples:
    """Return the listed samples of a stage, ready to be read.

    Pruned samples are read from where the shards are now: a pruning may have been removed and made
    again, in another folder.
    """
    output = run.folder.stage(stage).samples
    frame = read_frame(output, SAMPLES)
    before = run.plan.pruned_before(stage)
    if before is None:
        return Samples(output.manifest.facts["shards"], frame)
    return Samples(_kept_shard_urls(run, stage, before), frame)


def list_target_samples(run: Run, target: str) -> Samples:
    """Return the samples of a target.

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


def damaged_shard_handler(data: DataConfig, skipped: list[str]) -> Callable[[str], None] | None:
    """Return what to call with a sentence about each damaged shard.

    Returns:
        None if the plan says to fail. Else a function that adds the sentence to `skipped` and
        prints it.
    """
    if data.damaged == "fail":
        return None

    def skip(sentence: str) -> None:
        skipped.append(sentence)
        print_status(f"left out: {sentence}")

    return skip


def stage_shard_urls(run: Run, stage: int) -> list[str]:
    """Return the shards that a stage trains on.

    Raises:
        PlanError: the stage before is not pruned yet, or kept no sample.
    """
    before = run.plan.pruned_before(stage)
    if before is None:
        return expand_shard_urls(run.plan.data.shards)
    urls = _kept_shard_urls(run, stage, before)
    if not urls:
        raise PlanError(f"stage {before} of {run.url} kept no sample; relax its policy")
    return urls


def shard_names(pruning: Output) -> list[str]:
    """Return the names of a pruning's shards within its output."""
    return [name for name in pruning.names() if name.startswith("shards/")]


def _list_checked(run: Run, stage: int, urls: list[str], skipped: list[str]) -> pl.DataFrame:
    """List shards. Pruned ones are compared with their manifest in the same pass.

    Raises:
        PlanError: a pruned shard is missing or has changed.
    """
    expected = {}
    before = run.plan.pruned_before(stage)
    if before is not None:
        pruning = _pruning_before(run, stage, before)
        files = pruning.manifest.files
        expected = {pruning.url(name): files[name]["sha256"] for name in shard_names(pruning)}
    try:
        return list_shards(urls, damaged_shard_handler(run.plan.data, skipped), expected)
    except WrongShardError as error:
        raise PlanError(
            f"the pruned shard {error.url} is {error.problem}; restore it, or remove its folder to "
            f"prune again"
        ) from error


def _kept_shard_urls(run: Run, stage: int, before: int) -> list[str]:
    pruning = _pruning_before(run, stage, before)
    return [pruning.url(name) for name in shard_names(pruning)]


def _pruning_before(run: Run, stage: int, before: int) -> Output:
    """The output of the plan's own pruning of stage `before`."""
    pruning = run.folder.stage(before).prune(PLAN_PRUNING)
    if not pruning.committed:
        raise PlanError(
            f"stage {stage} of {run.url} needs the shards of stage {before}; prune that first"
        )
    return pruning


def _check_kept_samples(run: Run, stage: int, frame: pl.DataFrame) -> None:
    """Compare the samples of pruned shards with those they were kept from, by SHA-256."""
    before = run.plan.pruned_before(stage)
    if before is None:
        return
    trained = read_frame(run.folder.stage(before).samples, SAMPLES, ["key", "sha256"])
    unknown = frame.join(trained, ["key", "sha256"], "anti", maintain_order="left")
    if len(unknown):
        pruning = run.folder.stage(before).prune(PLAN_PRUNING)
        raise StorageError(
            f"sample {unknown['key'][0]} of the pruned shards of stage {before} is not what stage "
            f"{before} trained on ({len(unknown)} such samples); restore the shards that it came "
            f"from, and remove {pruning.root.url} to prune again"
        )

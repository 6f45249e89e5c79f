"""Copies among a stage's samples: the same members under other keys, and nearly the same."""

from __future__ import annotations

import numpy as np
import polars as pl
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from secateur.errors import PlanError
from secateur.influence.similarity import whiten_directions
from secateur.storage import schemas
from secateur.storage.attempt import Attempt
from secateur.storage.faiss_index import similar_pairs
from secateur.storage.frames import read_frame, write_frame
from secateur.storage.outputs import Output
from secateur.storage.shards import Samples
from secateur.tasks.data.samples import read_stage_samples
from secateur.tasks.engine.progress import track
from secateur.tasks.run import Run
from secateur.tasks.training.loop import TrainingLoop
from secateur.tasks.valuation.target_gradients import (
    differentiate_samples,
    loop_at_stage_end,
    split_for_gradients,
)

COPIES = "copies.parquet"
# Of the pairs found among 2,200 samples, fewer than one in a hundred are no copies.
SIMILARITY = 0.95


def find_copies(run: Run, stage: int, similarity: float = SIMILARITY) -> pl.DataFrame:
    """Return the samples of a stage that have copies, with the `group` that they form.

    Two samples are copies if their members are the same, or if the gradients of their losses at the
    stage's end are alike (see `whiten_directions`). So are the copies of copies. Gradients are
    compared, and not embeddings, because embeddings of a sample differ from step to step.

    Args:
        similarity: two samples are alike above this product of their vectors.

    Returns:
        One row per sample that has a copy, see `schemas.COPIES`.

    Raises:
        PlanError: the similarity is none, or the stage is not trained to its end.
    """
    if not 0 < similarity < 1:
        raise PlanError(
            f"--similarity is {similarity:g}; give a number between 0 and 1, such as {SIMILARITY}"
        )
    output = run.folder.stage(stage).copies(similarity)

    def write(attempt: Attempt) -> None:
        samples = read_stage_samples(run, stage)
        frame = _group_copies(samples, _alike(loop_at_stage_end(run, stage), samples, similarity))
        write_frame(attempt, COPIES, frame, schemas.COPIES)
        attempt.facts.update(groups=frame["group"].n_unique(), samples=len(frame))

    output.write_once("copies", {"basis": run.folder.basis.fingerprint}, write)
    return _read_copies(output)


def count_copies(run: Run, stage: int) -> dict[str, int]:
    """Return how many copies each sample of a stage has, by its key, if it has any.

    Nearly equal samples count if `find_copies` has found them with its default similarity.
    """
    output = run.folder.stage(stage).copies(SIMILARITY)
    if output.committed:
        copies = _read_copies(output)
    else:
        exact = _with_exact(read_stage_samples(run, stage))
        copies = exact.filter(pl.col("exact").is_duplicated()).rename({"exact": "group"})
    return dict(copies.select("key", pl.len().over("group") - 1).iter_rows())


def _read_copies(output: Output) -> pl.DataFrame:
    return read_frame(output, COPIES)


def _alike(
    loop: TrainingLoop, samples: Samples, similarity: float
) -> tuple[np.ndarray, np.ndarray]:
    """The pairs of samples whose gradients are alike, with the loop's weights."""
    chunks = split_for_gradients(loop, samples, torch.arange(len(samples)))
    label = f"stage {loop.schedule.number}, comparing samples"
    gradients = [
        differentiate_samples(loop, samples, rows, check=False)[0]
        for rows in track(chunks, label, len(chunks))
    ]
    return similar_pairs(whiten_directions(torch.cat(gradients)).numpy(), similarity)


def _group_copies(samples: Samples, alike: tuple[np.ndarray, np.ndarray]) -> pl.DataFrame:
    """The groups that pairs of samples, and samples of the same content, are connected to."""
    exact = _with_exact(samples)
    firsts = np.concatenate([alike[0], exact["sample"].to_numpy()])
    seconds = np.concatenate([alike[1], exact["exact"].to_numpy()])
    edges = coo_array((np.ones(len(firsts), bool), (firsts, seconds)), shape=(len(exact),) * 2)
    _, labels = connected_components(edges, directed=False)
    grouped = exact.with_columns(label=pl.Series(labels)).with_columns(
        group=pl.col("sample").first().over("label"), size=pl.len().over("label")
    )
    return grouped.filter(pl.col("size") > 1).select(*schemas.COPIES)


def _with_exact(samples: Samples) -> pl.DataFrame:
    """The samples, with the row of the first one that has the same members as `exact`."""
    # A list of samples that an earlier version wrote has no hash of their content.
    hashed = "content" in samples.frame.columns
    same = pl.col("sample").first().over("content") if hashed else pl.col("sample")
    return samples.frame.select("sample", "key", exact=same)

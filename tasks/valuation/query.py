"""Find the most influential samples for a target or a single sample, over the stages of a run."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import polars as pl
import torch
from jaxtyping import Float
from pydantic import BaseModel
from torch import Tensor

from secateur.errors import PlanError
from secateur.influence.pullback import pull_back, query_at_stage_end
from secateur.storage.faiss_index import read_index, search_index
from secateur.storage.shards import Samples
from secateur.tasks.data.samples import list_target_samples, read_stage_samples
from secateur.tasks.results.valuation_results import (
    coupled_spans,
    read_embeddings,
    read_scores,
    read_target_gradients,
    read_transition,
    to_embedding_space,
)
from secateur.tasks.run import Run
from secateur.tasks.valuation.target_gradients import differentiate_samples, loop_at_stage_end


class QueryHit(BaseModel):
    """A use of a sample. A positive score means that it lowered the loss asked about."""

    rank: int
    score: float
    key: str
    shard: str
    stage: int
    step: int
    window: int


def find_influential(
    run: Run,
    target: str | None = None,
    sample: str | None = None,
    top: int = 10,
    harmful: bool = False,
    stage: int | None = None,
    window: int | None = None,
) -> list[QueryHit]:
    """Return the samples that most lowered a loss at the end of the last indexed stage.

    The loss is the mean over a target's samples, held out or not, or that of one sample. A training
    sample is listed once, by its strongest use.

    Args:
        target: the name of a target.
        sample: the key of a target sample or training sample.
        top: how many samples.
        harmful: return the samples that most raised the loss.
        stage: search the samples of one stage only.
        window: search one window of each stage only, by its number.

    Raises:
        PlanError: neither or both of target and sample are given, one is not known, or no stage is
            indexed.
    """
    stages = _indexed_stages(run, stage)
    if top < 1:
        raise PlanError(f"--top is {top}; ask for at least one sample")
    gradient = _question_gradient(run, stages[-1], target, sample)
    hits: list[QueryHit] = []
    for number, query in stage_queries(run, stages, gradient):
        if stage in (None, number):
            signed = -query if harmful else query
            hits += _stage_hits(run, number, signed, top, harmful, window)
    hits.sort(key=lambda hit: (hit.score if harmful else -hit.score, hit.stage, hit.step))
    strongest: dict[str, QueryHit] = {}
    for hit in hits:
        strongest.setdefault(hit.key, hit)
    best = list(strongest.values())[:top]
    return [hit.model_copy(update={"rank": rank}) for rank, hit in enumerate(best, 1)]


def stage_queries(
    run: Run, stages: list[int], gradients: Float[Tensor, "m p"]
) -> list[tuple[int, np.ndarray]]:
    """Return the queries for each stage's index, the last stage first.

    For earlier stages they are pulled back through the stages after them.

    Args:
        stages: consecutive stages.
        gradients: loss gradients at the end of the last one.
    """
    transitions = {n: read_transition(run.folder.stage(n).embeddings) for n in stages}
    query = query_at_stage_end(gradients, coupled_spans(run), transitions[stages[-1]])
    queries = []
    for number in reversed(stages):
        queries.append((number, to_embedding_space(run, number, torch.cat(query, 1)).numpy()))
        if number > stages[0]:
            rows = [len(matrix) for matrix in transitions[number - 1]]
            query = pull_back(query, transitions[number], rows)
    return queries


def _indexed_stages(run: Run, stage: int | None) -> list[int]:
    stages = [n for n in range(len(run.plan.stages)) if run.folder.stage(n).index.committed]
    if not stages:
        raise PlanError(f"{run.url} has no indexed stage yet; `secateur run` its plan first")
    if stage is not None and stage not in stages:
        indexed = ", ".join(map(str, stages))
        raise PlanError(
            f"stage {stage} of {run.url} is not indexed; the indexed stages are {indexed}"
        )
    return stages


def _question_gradient(
    run: Run, last: int, target: str | None, sample: str | None
) -> Float[Tensor, "1 p"]:
    """The loss gradient asked about, at the end of stage `last`."""
    if (target is None) == (sample is None):
        raise PlanError(
            "a query is about a target or about a sample; give one of --target and --sample"
        )
    if target is not None:
        if target not in run.plan.targets:
            known = ", ".join(run.plan.targets)
            raise PlanError(f"{run.url} has no target {target}; it has {known}")
        return read_target_gradients(run, last, target).mean(0, keepdim=True)
    samples, row = _find_sample(run, str(sample))
    loop = loop_at_stage_end(run, last)
    return differentiate_samples(loop, samples, torch.tensor([row]))[0]


def _find_sample(run: Run, key: str) -> tuple[Samples, int]:
    """A sample by key: among the targets first, then among the first stage's samples."""
    sources = [partial(list_target_samples, run, name) for name in run.plan.targets]
    for source in (*sources, partial(read_stage_samples, run, 0)):
        samples = source()
        rows = samples.frame.filter(pl.col("key") == key)
        if len(rows):
            return samples, int(rows["sample"][0])
    raise PlanError(
        f"no target and no training shard of {run.url} holds a sample {key}; check the key"
    )


def _stage_hits(
    run: Run, stage: int, query: np.ndarray, top: int, harmful: bool, window: int | None
) -> list[QueryHit]:
    """The strongest uses in one stage, of at least `top` samples if it has so many.

    They have no rank yet, because the stages are not merged.
    """
    scores = read_scores(run, stage)
    index = read_index(run.folder.stage(stage).index)
    ids = None
    if window is not None:
        ids = np.flatnonzero((scores["window"] == window).to_numpy())
    exact = None if run.plan.index == "flat" else _embedding_reader(run, stage)
    available = len(scores) if ids is None else len(ids)
    # The best uses may be of few samples, so more uses are searched until there are enough samples.
    count = top
    while True:
        products, rows = search_index(index, query, count, ids, exact)[0]
        uses = scores[rows]
        if count >= available or uses["key"].n_unique() >= top:
            break
        count = min(available, count * 4)
    sign = -1.0 if harmful else 1.0
    columns = uses.select("key", "shard", "step", "window").iter_rows(named=True)
    return [
        QueryHit(rank=0, score=sign * float(product), stage=stage, **row)
        for product, row in zip(products, columns, strict=True)
    ]


def _embedding_reader(run: Run, stage: int) -> Callable[[np.ndarray], np.ndarray]:
    """A function that returns the stage's embeddings by row."""
    parts = read_embeddings(run.folder.stage(stage).embeddings)
    starts = np.cumsum([0, *(len(part) for part in parts)])

    def read_rows(ids: np.ndarray) -> np.ndarray:
        numbers = np.searchsorted(starts, ids, side="right") - 1
        rows = [parts[n][row - starts[n]].numpy() for n, row in zip(numbers, ids, strict=True)]
        return np.stack(rows)

    return read_rows

"""Room `tasks`: the most influential samples for a target or a single sample, over the stages of a run."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import polars as pl
import torch
from pydantic import BaseModel
from torch import Tensor

from secateur.errors import PlanError
from secateur.influence.pullback import pull_back, query_at_stage_end
from secateur.storage.faiss_index import read_index, search_index
from secateur.storage.shards import Samples
from secateur.tasks.data.samples import list_target_samples, read_stage_samples
from secateur.tasks.engine.prefect_task import pipeline_task
from secateur.tasks.run.run import Run
from secateur.tasks.valuation.embed import (
    in_embeddings,
    spans_of,
    stage_embeddings,
    stage_transition,
)
from secateur.tasks.valuation.score import read_scores
from secateur.tasks.valuation.target_gradients import (
    differentiate_samples,
    loop_at_stage_end,
    read_target_gradients,
)


class QueryHit(BaseModel):
    """A use of a sample; a positive score means that it lowered the loss asked about."""

    rank: int
    score: float
    key: str
    shard: str
    stage: int
    step: int
    window: int


@pipeline_task("search", draws=True)
def find_influential(
    run_url: str,
    target: str | None = None,
    sample: str | None = None,
    top: int = 10,
    harmful: bool = False,
    stage: int | None = None,
    window: int | None = None,
) -> list[QueryHit]:
    """The `top` samples that most lowered (or, `harmful`, raised) the loss of a target or of one sample at the end of
    the last trained stage. A sample stands once, by its strongest use.

    Raises:
        PlanError: neither or both of target and sample are given, one isn't known, or no stage is indexed.
    """
    run = Run.open(run_url)
    stages = [n for n in range(len(run.plan.stages)) if run.folder.stage(n).index.committed]
    if not stages:
        raise PlanError(f"{run_url} has no indexed stage yet; `secateur run` its plan first")
    if stage is not None and stage not in stages:
        raise PlanError(
            f"stage {stage} of {run_url} is not indexed; indexed are {', '.join(map(str, stages))}"
        )
    if top < 1:
        raise PlanError(f"--top is {top}; ask for at least one sample")
    gradient = _question(run, stages[-1], target, sample)
    hits: list[QueryHit] = []
    for number, query in stage_queries(run, stages, gradient):
        if stage in (None, number):
            hits += _stage_hits(run, number, -query if harmful else query, top, harmful, window)
    strongest = sorted(
        hits, key=lambda hit: (hit.score if harmful else -hit.score, hit.stage, hit.step)
    )
    first: dict[str, QueryHit] = {}
    for hit in strongest:
        first.setdefault(hit.key, hit)
    return [
        hit.model_copy(update={"rank": n}) for n, hit in enumerate(list(first.values())[:top], 1)
    ]


def _question(run: Run, last: int, target: str | None, sample: str | None) -> Tensor:
    """`1 p`: the loss gradient asked about, at the end of stage `last`."""
    if (target is None) == (sample is None):
        raise PlanError(
            "a query is about a target or about a sample; give one of --target and --sample"
        )
    if target is not None:
        if target not in run.plan.targets:
            raise PlanError(
                f"{run.url} has no target {target}; it has {', '.join(run.plan.targets)}"
            )
        return read_target_gradients(run.folder.stage(last).targets, target).mean(0, keepdim=True)
    samples, row = _find(run, str(sample))
    return differentiate_samples(loop_at_stage_end(run, last), samples, torch.tensor([row]))[0]


def _find(run: Run, key: str) -> tuple[Samples, int]:
    """A sample by key: among the targets, then among the first stage's samples."""
    sources = [partial(list_target_samples, run, name) for name in run.plan.targets]
    for source in (*sources, partial(read_stage_samples, run, 0)):
        samples = source()
        found = samples.frame.filter(pl.col("key") == key)
        if len(found):
            return samples, int(found["sample"][0])
    raise PlanError(
        f"no target and no training shard of {run.url} holds a sample {key}; check the key"
    )


def stage_queries(run: Run, stages: list[int], gradient: Tensor) -> list[tuple[int, np.ndarray]]:
    """The query for each stage's index, last stage first: pulled back through the stages after it."""
    transitions = {n: stage_transition(run.folder.stage(n).embeddings) for n in stages}
    query = query_at_stage_end(gradient, spans_of(run), transitions[stages[-1]])
    found = []
    for number in reversed(stages):
        found.append((number, in_embeddings(run, number, torch.cat(query, 1)).numpy()))
        if number > stages[0]:
            query = pull_back(query, transitions[number], [len(k) for k in transitions[number - 1]])
    return found


def _stage_hits(
    run: Run, stage: int, query: np.ndarray, top: int, harmful: bool, window: int | None
) -> list[QueryHit]:
    """The strongest uses in one stage, of at least `top` samples where there are as many."""
    folder, rows = run.folder.stage(stage), read_scores(run, stage)
    index = read_index(folder.index)
    ids = None if window is None else np.flatnonzero((rows["window"] == window).to_numpy())
    exact = None if run.plan.index == "flat" else _exact(run, stage)
    available, wanted = len(rows) if ids is None else len(ids), top
    while True:
        scores, found = search_index(index, query, wanted, ids, exact)[0]
        picked = rows[found]
        if wanted >= available or picked["key"].n_unique() >= top:
            break
        wanted = min(available, wanted * 4)
    sign = -1.0 if harmful else 1.0
    columns = picked.select("key", "shard", "step", "window").iter_rows(named=True)
    return [
        QueryHit(rank=0, score=sign * float(s), stage=stage, **row)
        for s, row in zip(scores, columns, strict=True)
    ]


def _exact(run: Run, stage: int) -> Callable[[np.ndarray], np.ndarray]:
    """Gives the stage's embeddings by row."""
    parts = stage_embeddings(run.folder.stage(stage).embeddings)
    starts = np.cumsum([0, *(len(p) for p in parts)])

    def rows(ids: np.ndarray) -> np.ndarray:
        where = np.searchsorted(starts, ids, side="right") - 1
        return np.stack([parts[w][i - starts[w]].numpy() for w, i in zip(where, ids, strict=True)])

    return rows

"""Find the most influential samples for a target or a single sample, over the stages of a run."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import polars as pl
from jaxtyping import Float
from torch import Tensor

from secateur.errors import PlanError
from secateur.storage.faiss_index import read_index, search_index
from secateur.tasks.results.agreement_results import find_agreement
from secateur.tasks.results.valuation_results import (
    read_embeddings,
    read_scores,
)
from secateur.tasks.run import Run
from secateur.tasks.valuation.copies import count_copies
from secateur.tasks.valuation.embedding_space import (
    pull_back_query,
    share_in_embeddings,
    start_query,
    to_embedding_space,
)
from secateur.tasks.valuation.pull_back import pull_back_scores
from secateur.tasks.valuation.query_answer import QueryAnswer, QueryHit, check_agreement
from secateur.tasks.valuation.question import find_question, question_gradient
from secateur.tasks.valuation.replay_question import replay_scores

ESTIMATES = ("embedding", "pull_back", "replay")


def find_influential(
    run: Run,
    target: str | None = None,
    sample: str | None = None,
    top: int = 10,
    harmful: bool = False,
    stage: int | None = None,
    window: int | None = None,
    estimate: str = "embedding",
) -> QueryAnswer:
    """Find the samples that most lowered a loss at the end of the last indexed stage.

    The loss is the mean over a target's samples, held out or not, or that of one sample. A training
    sample is listed once, by its strongest use.

    Args:
        target: the name of a target.
        sample: the key of a target sample or training sample.
        top: how many samples.
        harmful: return the samples that most raised the loss.
        stage: search the samples of one stage only.
        window: search one window of each stage only, by its number.
        estimate: `embedding` searches the index; `pull_back` takes the question back through the
            ledgers, which is as exact as the curvature and needs no index in memory; `replay`
            takes it back through training itself.

    Raises:
        PlanError: neither or both of target and sample are given, one is not known, no stage is
            indexed, the stages cannot be replayed, or answers by this estimate agree with replay
            less than the plan demands.
    """
    if estimate not in ESTIMATES:
        raise PlanError(f"--estimate is {estimate}; give one of {', '.join(ESTIMATES)}")
    if top < 1:
        raise PlanError(f"--top is {top}; ask for at least one sample")
    stages = indexed_stages(run, stage)
    question = find_question(run, target, sample)
    searched = stages if stage is None else [stage]
    if estimate == "replay":
        found = replay_scores(run, stages, question)
        hits = _rank_samples(run, _all_uses(run, found, searched, window), top, harmful)
        return QueryAnswer(hits=hits, estimate=estimate, held=None, agreement={})
    agreement = {number: find_agreement(run, number) for number in searched}
    check_agreement(run, estimate, agreement)
    gradient, held = question_gradient(run, stages[-1], question)
    if estimate == "pull_back":
        pulled = ((n, scores[:, 0]) for n, scores in pull_back_scores(run, stages, gradient))
        frames = _all_uses(run, pulled, searched, window)
    else:
        queries = [one for one in stage_queries(run, stages, gradient) if one[0] in searched]
        signed = [(number, -query if harmful else query) for number, query in queries]
        frames = [_search_stage(run, n, query, top, harmful, window) for n, query in signed]
        if held is not None:
            held *= share_in_embeddings(run, stages[-1], gradient)
    hits = _rank_samples(run, frames, top, harmful)
    return QueryAnswer(hits=hits, estimate=estimate, held=held, agreement=agreement)


def _all_uses(
    run: Run,
    scored: Iterator[tuple[int, Float[Tensor, " uses"]]],
    searched: list[int],
    window: int | None,
) -> list[pl.DataFrame]:
    """The uses of the stages that are searched, from the scores of every use."""
    frames = []
    for number, scores in scored:
        uses = _with_scores(read_scores(run, number), scores.numpy(), number)
        if number in searched:
            frames.append(uses if window is None else uses.filter(pl.col("window") == window))
    return frames


def _rank_samples(run: Run, frames: list[pl.DataFrame], top: int, harmful: bool) -> list[QueryHit]:
    """The best samples, each by its strongest use."""
    order = pl.concat(frames).sort("score", "stage", "step", descending=[not harmful, False, False])
    best = order.unique("key", keep="first", maintain_order=True).head(top)
    hits = [QueryHit(rank=rank, **row) for rank, row in enumerate(best.iter_rows(named=True), 1)]
    copies = {stage: count_copies(run, stage) for stage in {hit.stage for hit in hits}}
    for hit in hits:
        hit.copies = copies[hit.stage].get(hit.key, 0)
    return hits


def _with_scores(uses: pl.DataFrame, scores: np.ndarray, stage: int) -> pl.DataFrame:
    """The columns of a hit, but for its rank."""
    columns = uses.select("key", "shard", "step", "window")
    score = pl.Series("score", scores, dtype=pl.Float64)
    return columns.with_columns(score, stage=pl.lit(stage))


def stage_queries(
    run: Run, stages: list[int], gradients: Float[Tensor, "m p"]
) -> list[tuple[int, np.ndarray]]:
    """Return the queries for each stage's index, the last stage first.

    For earlier stages they are pulled back through the stages after them.

    Args:
        stages: consecutive stages.
        gradients: loss gradients at the end of the last one.
    """
    query = start_query(run, gradients)
    queries = []
    for number in reversed(stages):
        queries.append((number, to_embedding_space(run, number, query).numpy()))
        if number > stages[0]:
            query = pull_back_query(run, number, query)
    return queries


def indexed_stages(run: Run, stage: int | None) -> list[int]:
    """Return the indexed stages, from the one that is searched: a question goes no further back.

    Raises:
        PlanError: there are none, or `stage` is not among them.
    """
    stages = [n for n in range(len(run.plan.stages)) if run.folder.stage(n).index.committed]
    if not stages:
        raise PlanError(f"{run.url} has no indexed stage yet; `secateur run` its plan first")
    if stage is not None and stage not in stages:
        indexed = ", ".join(map(str, stages))
        raise PlanError(
            f"stage {stage} of {run.url} is not indexed; the indexed stages are {indexed}"
        )
    return [number for number in stages if stage is None or number >= stage]


def _search_stage(
    run: Run, stage: int, query: np.ndarray, top: int, harmful: bool, window: int | None
) -> pl.DataFrame:
    """The strongest uses in one stage, of at least `top` samples if it has so many."""
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
    return _with_scores(uses, -products if harmful else products, stage)


def _embedding_reader(run: Run, stage: int) -> Callable[[np.ndarray], np.ndarray]:
    """A function that returns the stage's embeddings by row."""
    parts = read_embeddings(run.folder.stage(stage).embeddings)
    starts = np.cumsum([0, *(len(part) for part in parts)])

    def read_rows(ids: np.ndarray) -> np.ndarray:
        numbers = np.searchsorted(starts, ids, side="right") - 1
        rows = [parts[n][row - starts[n]].numpy() for n, row in zip(numbers, ids, strict=True)]
        return np.stack(rows)

    return read_rows

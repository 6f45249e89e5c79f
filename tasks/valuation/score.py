"""Room `tasks`: the score of every recorded use of a sample, for every target (DESIGN, section 4)."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import polars as pl
import torch
from torch import Tensor

from secateur.influence.baselines import gradient_norms
from secateur.influence.pullback import query_at_stage_end
from secateur.influence.recursion import short_horizon_effects
from secateur.influence.scoring import mean_alignment, nearest_alignment
from secateur.influence.segment import Segment
from secateur.storage.frames import read_frame, write_frame
from secateur.tasks.data.samples import read_stage_samples
from secateur.tasks.engine.prefect_task import pipeline_task
from secateur.tasks.engine.progress import track
from secateur.tasks.run.run import Run
from secateur.tasks.valuation.embed import (
    dynamics_of,
    in_embeddings,
    segment_of,
    spans_of,
    stage_embeddings,
    stage_transition,
)
from secateur.tasks.valuation.replay import read_replay_scores
from secateur.tasks.valuation.target_gradients import read_scoring_gradients

SCORES = "scores.parquet"


@pipeline_task("score", makes=lambda run, stage: run.folder.stage(stage).scores)
def write_scores(run_url: str, stage: int) -> int:
    """Writes `scores.parquet`: one row a recorded use of a sample, in the order of the stage's embeddings.

    Columns: `sample` (row of the stage's list), `key`, `shard`, `step`, `window`, `loss` before the step, `norm` of the
    contribution, the baselines `grand` and `el2n` (see the plan's policies), and for every target `score_<target>`, positive where the sample helped it.

    Returns:
        Number of rows.
    """
    run = Run.open(run_url)
    folder = run.folder.stage(stage)
    if not folder.scores.committed:
        names = list(run.plan.targets)
        targets = {name: read_scoring_gradients(run, stage, name) for name in names}
        listed = read_stage_samples(run, stage)
        inputs = {
            "embeddings": folder.embeddings.fingerprint,
            "targets": folder.targets.fingerprint,
        }
        with folder.scores.attempt("scores", inputs) as attempt:
            count = len(folder.segments())
            scored = (
                _replayed(run, stage)
                if run.plan.estimate == "replay"
                else _aggregated(run, stage, targets)
            )
            parts = [
                _frame(segment).with_columns(
                    pl.Series(f"score_{name}", values) for name, values in found.items()
                )
                for segment, found in track(scored, f"stage {stage}, scoring", count)
            ]
            shards = pl.DataFrame(
                {"shard": range(len(listed.urls)), "url": listed.urls},
                schema_overrides={"shard": pl.UInt32},
            )
            samples = listed.frame.select("sample", "key", "shard").join(
                shards, "shard", maintain_order="left"
            )
            frame = pl.concat(parts).join(
                samples.rename({"shard": "_", "url": "shard"}), "sample", maintain_order="left"
            )
            scores = [f"score_{name}" for name in names]
            frame = frame.select(
                "sample", "key", "shard", "step", "window", "loss", "norm", "grand", "el2n", *scores
            )
            write_frame(attempt, SCORES, frame)
            attempt.facts.update(rows=len(frame), **run.plan.score.model_dump(mode="json"))
    return int(folder.scores.manifest.facts["rows"])


def read_scores(run: Run, stage: int) -> pl.DataFrame:
    """The stage's `scores.parquet`."""
    return read_frame(run.folder.stage(stage).scores, SCORES)


def scored_vectors(run: Run, stage: int) -> Iterator[tuple[Segment, Tensor]]:
    """Each segment's record, and what its selected records are scored by, as of the plan's horizon."""
    folder, horizon = run.folder.stage(stage), run.plan.score.horizon
    ledgers = folder.segments()
    embeddings = stage_embeddings(folder.embeddings) if horizon == "stage" else []
    for number, ledger in enumerate(ledgers):
        segment = segment_of(ledger)
        if horizon == "stage":
            yield (
                segment,
                embeddings[number] if run.plan.components else theta_of(run, embeddings[number]),
            )
        elif horizon == 0:
            yield segment, segment.contributions[segment.selected]
        else:
            reach = 1 + -(-horizon // run.plan.segment_steps)
            following = [segment_of(later) for later in ledgers[number + 1 : number + reach]]
            yield (
                segment,
                short_horizon_effects(
                    [dynamics_of(run, s) for s in (segment, *following)], int(horizon)
                ),
            )


def _aggregated(
    run: Run, stage: int, targets: dict[str, Tensor]
) -> Iterator[tuple[Segment, dict[str, np.ndarray]]]:
    """Each segment's record, and for each target the scores of its selected records from their vectors."""
    if run.plan.score.horizon == "stage" and run.plan.components:
        transition = stage_transition(run.folder.stage(stage).embeddings)
        queries = {
            name: torch.cat(query_at_stage_end(g, spans_of(run), transition), 1)
            for name, g in targets.items()
        }
        targets = {name: in_embeddings(run, stage, query) for name, query in queries.items()}
    for segment, vectors in scored_vectors(run, stage):
        yield (
            segment,
            {name: aggregate(run, vectors, gradients) for name, gradients in targets.items()},
        )


def _replayed(run: Run, stage: int) -> Iterator[tuple[Segment, dict[str, np.ndarray]]]:
    """The same from the replay of training."""
    for number, ledger in enumerate(run.folder.stage(stage).segments()):
        yield (
            segment_of(ledger),
            {name: s.numpy() for name, s in read_replay_scores(run, stage, number).items()},
        )


def theta_of(run: Run, embeddings: Tensor) -> Tensor:
    """The parameters' part of embeddings that may hold the optimizer's slots too."""
    spans = spans_of(run)
    slots = embeddings.shape[1] // spans[-1].stop
    return torch.cat(
        [embeddings[:, slots * s.start : slots * s.start + s.stop - s.start] for s in spans], 1
    )


def aggregate(run: Run, vectors: Tensor, gradients: Tensor) -> np.ndarray:
    """One score a vector, as the plan's aggregate over a target's samples says."""
    if run.plan.score.aggregate == "mean":
        return mean_alignment(vectors, gradients).numpy()
    return nearest_alignment(vectors, gradients, run.plan.score.temperature).numpy()


def _frame(segment: Segment) -> pl.DataFrame:
    """The columns of the selected records that the ledger has."""
    chosen = segment.selected
    return pl.DataFrame(
        {
            "sample": segment.samples[chosen].numpy().astype(np.uint32),
            "step": segment.steps[chosen].numpy().astype(np.uint32),
            "window": segment.windows[chosen].numpy().astype(np.uint32),
            "loss": segment.losses[chosen].numpy(),
            "norm": segment.contributions[chosen].norm(dim=1).double().numpy(),
            "grand": gradient_norms(segment)[chosen].numpy(),
            "el2n": segment.errors[chosen].numpy(),
        }
    )

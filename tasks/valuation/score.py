"""The score of every recorded use of a sample, for every target."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import polars as pl
import torch
from jaxtyping import Float
from torch import Tensor

from secateur.influence.baselines import gradient_norms
from secateur.influence.recursion import short_horizon_effects
from secateur.influence.scoring import mean_alignment, nearest_alignment
from secateur.influence.segment import Segment
from secateur.storage import schemas
from secateur.storage.attempt import Attempt
from secateur.storage.frames import write_frame
from secateur.tasks.data.samples import read_stage_samples
from secateur.tasks.engine.progress import track
from secateur.tasks.results.valuation_results import (
    SCORES,
    coupled_spans,
    is_reduced,
    read_embeddings,
    read_replay_scores,
    read_scoring_gradients,
)
from secateur.tasks.run import Run
from secateur.tasks.valuation.dynamics import plan_dynamics, read_segment
from secateur.tasks.valuation.embedding_space import start_query, to_embedding_space

# A segment's record, and each target's scores of its selected records.
ScoredSegment = tuple[Segment, dict[str, np.ndarray]]


def write_scores(run: Run, stage: int) -> int:
    """Write `scores.parquet`: one row per recorded use of a sample, ordered as the embeddings are.

    Columns: `sample` (row of the stage's sample list), `key`, `shard`, `step`, `window`, `loss`
    before the step, `norm` of the contribution, the baselines `grand` and `el2n` (see the plan's
    policies), and for every target `score_<target>`, positive if the sample helped it.

    Returns:
        Number of rows.
    """
    folder = run.folder.stage(stage)
    inputs = {
        "embeddings": folder.embeddings.fingerprint,
        "targets": folder.targets.fingerprint,
    }

    def write(attempt: Attempt) -> None:
        frame = pl.concat(_segment_frames(run, stage))
        frame = frame.join(_sample_places(run, stage), "sample", maintain_order="left")
        schema = schemas.scores_schema(run.plan.targets)
        write_frame(attempt, SCORES, frame.select(*schema), schema)
        attempt.facts.update(rows=len(frame), **run.plan.score.model_dump(mode="json"))

    return int(folder.scores.write_once("scores", inputs, write).facts["rows"])


def scored_vectors(
    run: Run, stage: int
) -> Iterator[tuple[Segment, Float[Tensor, "selected width"]]]:
    """Yield each segment's record, and the vectors that its selected records are scored by.

    The vectors are read at the plan's horizon.
    """
    folder = run.folder.stage(stage)
    horizon = run.plan.score.horizon
    ledgers = folder.segments()
    embeddings = read_embeddings(folder.embeddings) if horizon == "stage" else []
    for number, ledger in enumerate(ledgers):
        segment = read_segment(ledger)
        if horizon == "stage":
            vectors = embeddings[number]
            yield segment, vectors if is_reduced(run) else _theta_part(run, vectors)
        elif horizon == 0:
            yield segment, segment.contributions[segment.selected]
        else:
            # The horizon may reach into this many of the following segments.
            reach = 1 + -(-horizon // run.plan.segment_steps)
            following = [read_segment(later) for later in ledgers[number + 1 : number + reach]]
            dynamics = [plan_dynamics(run, one) for one in (segment, *following)]
            yield segment, short_horizon_effects(dynamics, int(horizon))


def aggregate_scores(
    run: Run, vectors: Float[Tensor, "n p"], gradients: Float[Tensor, "m p"]
) -> np.ndarray:
    """Return one score per vector: the plan's aggregate over a target's sample gradients."""
    if run.plan.score.aggregate == "mean":
        return mean_alignment(vectors, gradients).numpy()
    return nearest_alignment(vectors, gradients, run.plan.score.temperature).numpy()


def _segment_frames(run: Run, stage: int) -> list[pl.DataFrame]:
    by_replay = run.plan.estimate == "replay"
    scored = _replay_scores(run, stage) if by_replay else _vector_scores(run, stage)
    count = len(run.folder.stage(stage).segments())
    frames = []
    for segment, scores in track(scored, f"stage {stage}, scoring", count):
        columns = [pl.Series(f"score_{name}", values) for name, values in scores.items()]
        frames.append(_ledger_columns(segment).with_columns(columns))
    return frames


def _vector_scores(run: Run, stage: int) -> Iterator[ScoredSegment]:
    """Each segment's record, and its scores from the selected records' vectors."""
    targets = {name: read_scoring_gradients(run, stage, name) for name in run.plan.targets}
    if run.plan.score.horizon == "stage" and is_reduced(run):
        for name, gradients in targets.items():
            targets[name] = to_embedding_space(run, stage, start_query(run, gradients))
    for segment, vectors in scored_vectors(run, stage):
        scores = {
            name: aggregate_scores(run, vectors, gradients) for name, gradients in targets.items()
        }
        yield segment, scores


def _replay_scores(run: Run, stage: int) -> Iterator[ScoredSegment]:
    """The same by replay."""
    for number, ledger in enumerate(run.folder.stage(stage).segments()):
        scores = read_replay_scores(run, stage, number)
        yield read_segment(ledger), {name: values.numpy() for name, values in scores.items()}


def _theta_part(run: Run, embeddings: Float[Tensor, "n width"]) -> Float[Tensor, "n p"]:
    """The parameters' part of embeddings that may hold the optimizer's slots too."""
    spans = coupled_spans(run)
    slots = embeddings.shape[1] // spans[-1].stop
    parts = []
    for span in spans:
        # Each span's slots stand one after the other, theta first.
        start = slots * span.start
        parts.append(embeddings[:, start : start + span.stop - span.start])
    return torch.cat(parts, 1)


def _sample_places(run: Run, stage: int) -> pl.DataFrame:
    """The key and the shard's URL of each of the stage's samples."""
    listed = read_stage_samples(run, stage)
    urls = pl.DataFrame(
        {"number": range(len(listed.urls)), "shard": listed.urls},
        schema_overrides={"number": pl.UInt32},
    )
    samples = listed.frame.select("sample", "key", number="shard")
    return samples.join(urls, "number", maintain_order="left").drop("number")


def _ledger_columns(segment: Segment) -> pl.DataFrame:
    """The columns of the selected records that come from the ledger."""
    selected = segment.selected
    return pl.DataFrame(
        {
            "sample": segment.samples[selected].numpy().astype(np.uint32),
            "step": segment.steps[selected].numpy().astype(np.uint32),
            "window": segment.windows[selected].numpy().astype(np.uint32),
            "loss": segment.losses[selected].numpy(),
            "norm": segment.contributions[selected].norm(dim=1).double().numpy(),
            "grand": gradient_norms(segment)[selected].numpy(),
            "el2n": segment.errors[selected].numpy(),
        }
    )

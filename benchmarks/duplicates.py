"""The study of duplicates: what the later copies of a sample are worth beside its first, within one epoch.

Of 3,000 MNIST images 200 each are there 2, 4 and 8 times, byte for byte, under keys of their own. TSLOO of every use, by
embeddings and by replay, against the mean of a clean target at the epoch's end. As any use's effect depends on when it
happens, a copy is held against the samples that are there once and were used in the same tenth of the epoch.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from benchmarks.arms import first_stage
from benchmarks.mislabelled import images
from examples.shards import write_shards
from secateur.tasks.data.samples import read_stage_samples
from secateur.tasks.plan import Plan
from secateur.tasks.run.run import Run
from secateur.tasks.valuation.replay import read_replay_scores, replay_stage
from secateur.tasks.valuation.score import aggregate, read_scores, scored_vectors
from secateur.tasks.valuation.target_gradients import read_scoring_gradients

IMAGES, EACH, TARGET = 3000, 200, 500
COPIES = (2, 4, 8)
PARTS = 10
KINDS = ("embedding", "replay")


def study(folder: Path, seed: int) -> dict[str, Any]:
    """For each number of copies and each place among them, in units of the mean score of the samples that are there once:
    the mean score, that beyond single samples of the same tenth of the epoch; and how many score lower than the first."""
    _make(folder / "data", seed)
    run = first_stage(_plan(folder, seed))
    samples = read_stage_samples(run, 0)
    facts = pl.DataFrame([json.loads(s["json"]) for s in samples.read(range(len(samples)))])
    uses = (
        read_scores(run, 0)
        .select("sample", "step")
        .with_columns(embedding=_embedding(run), replay=_replayed(run))
    )
    uses = uses.join(facts.with_row_index("sample"), "sample", maintain_order="left").sort(
        "step", maintain_order=True
    )
    part = pl.col("step") * PARTS // (pl.col("step").max() + 1)
    uses = uses.with_columns(place=pl.int_range(1, pl.len() + 1).over("image"), part=part)
    single = uses.filter(pl.col("copies") == 1)
    average = single.select(pl.col(*KINDS).mean()).row(0, named=True)
    timed = single.group_by("part").agg(pl.col(k).mean().alias(f"single_{k}") for k in KINDS)
    first = uses.filter(pl.col("place") == 1).select(
        "image", *(pl.col(k).alias(f"first_{k}") for k in KINDS)
    )
    joined = uses.join(timed, "part").join(first, "image")
    rows = joined.group_by("copies", "place").agg(
        *(pl.col(k).mean() / average[k] for k in KINDS),
        *(
            (pl.col(k) - pl.col(f"single_{k}")).mean().alias(f"beyond_{k}") / average[k]
            for k in KINDS
        ),
        *((pl.col(k) < pl.col(f"first_{k}")).mean().alias(f"lower_{k}") for k in KINDS),
    )
    return {"rows": rows.sort("copies", "place").to_dicts()}


def _plan(folder: Path, seed: int) -> Plan:
    return Plan.model_validate(
        {
            "run": "run",
            "root": str(folder),
            "seed": seed,
            "threads": 1,
            "model": {"factory": "examples.images.model:mlp", "args": {"hidden": 128}},
            "task": {"factory": "benchmarks.mislabelled:Pictures"},
            "data": {"shards": f"{folder}/data/train-000000.tar"},
            "targets": {"clean": {"shards": f"{folder}/data/target-000000.tar"}},
            "optimizer": {"kind": "sgd", "lr": 0.1},
            "schedule": {"kind": "cosine", "warmup": 0.1},
            "stages": [{"epochs": 1, "batch_size": 32}],
            "score": {"horizon": "stage", "aggregate": "mean", "estimate": "embedding"},
        }
    )


def _make(out: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    pixels, labels = images("mnist")
    order = rng.permutation(len(pixels))
    repeated = [n for copies in COPIES for n in [copies] * EACH]
    counts = np.array(repeated + [1] * (IMAGES - len(repeated)))
    listed = [(n, copy) for n, count in enumerate(counts) for copy in range(count)]
    samples = [
        {"__key__": f"image-{n:05d}-{copy}"}
        | _members(pixels, labels, order[n], {"image": n, "copies": int(counts[n])})
        for n, copy in listed
    ]
    write_shards(str(out / "train-%06d.tar"), samples, 1)
    target = [
        {"__key__": f"t-{i:05d}"} | _members(pixels, labels, i, {})
        for i in order[IMAGES : IMAGES + TARGET]
    ]
    write_shards(str(out / "target-%06d.tar"), target, 1)


def _members(
    pixels: np.ndarray, labels: np.ndarray, row: int, facts: dict[str, int]
) -> dict[str, Any]:
    return {
        "raw": pixels[row].tobytes(),
        "cls": str(labels[row]),
        "json": json.dumps(facts).encode(),
    }


def _embedding(run: Run) -> np.ndarray:
    gradients = read_scoring_gradients(run, 0, "clean")
    return np.concatenate(
        [aggregate(run, vectors, gradients) for _, vectors in scored_vectors(run, 0)]
    )


def _replayed(run: Run) -> np.ndarray:
    replay_stage.fn(run.url, 0)
    segments = range(len(run.folder.stage(0).segments()))
    return np.concatenate(
        [read_replay_scores(run, 0, number)["clean"].numpy() for number in segments]
    )

"""The study of duplicates: the scores of a sample's first copy and of later ones in an epoch.

There are 3,000 MNIST images. 200 of them are there 2 times, 200 others 4 times and 200 others 8
times, byte for byte, under different keys. The score of every use is its effect (TSLOO) on the mean
loss of a clean target at the epoch's end, by embeddings and by replay. The effect of any use
depends on when it happens, so a copy is compared with samples that are there once and were used in
the same tenth of the epoch.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from benchmarks.arms import start_scored
from benchmarks.mislabelled import read_images
from examples.shards import write_shards
from secateur.tasks.data.samples import read_stage_samples
from secateur.tasks.plan import Plan
from secateur.tasks.results.valuation_results import read_scores
from secateur.tasks.run import Run
from secateur.tasks.valuation.stage_effects import stage_effects

IMAGES, EACH, TARGET = 3000, 200, 500
COPIES = (2, 4, 8)
PARTS = 10
KINDS = ("embedding", "replay")


def study(folder: Path, seed: int) -> dict[str, Any]:
    """Return figures for each number of copies and each place among them.

    They are the mean score, the mean difference from single samples of the same tenth of the epoch
    (`beyond`), both in units of the mean score of single samples, and the share of copies that
    score lower than the first one (`lower`).
    """
    _write_data(folder / "data", seed)
    uses = _score_uses(start_scored(_make_plan(folder, seed)))
    single = uses.filter(pl.col("copies") == 1)
    average = single.select(pl.col(*KINDS).mean()).row(0, named=True)
    single_means = (pl.col(kind).mean().alias(f"single_{kind}") for kind in KINDS)
    single_by_part = single.group_by("part").agg(single_means)
    first_scores = (pl.col(kind).alias(f"first_{kind}") for kind in KINDS)
    first = uses.filter(pl.col("place") == 1).select("image", *first_scores)
    joined = uses.join(single_by_part, "part").join(first, "image")
    means = [pl.col(kind).mean() / average[kind] for kind in KINDS]
    differences = [
        (pl.col(kind) - pl.col(f"single_{kind}")).mean().alias(f"beyond_{kind}") / average[kind]
        for kind in KINDS
    ]
    lower = [
        (pl.col(kind) < pl.col(f"first_{kind}")).mean().alias(f"lower_{kind}") for kind in KINDS
    ]
    rows = joined.group_by("copies", "place").agg(*means, *differences, *lower)
    return {"rows": rows.sort("copies", "place").to_dicts()}


def _score_uses(run: Run) -> pl.DataFrame:
    """One row per use: its image, its place among the copies, its tenth, and both scores."""
    samples = read_stage_samples(run, 0)
    facts = [json.loads(sample["json"]) for sample in samples.read(range(len(samples)))]
    images = pl.DataFrame(facts).with_row_index("sample")
    scores = read_scores(run, 0).select("sample", "step")
    effects = [pl.Series(kind, stage_effects(run, 0, "clean", kind).numpy()) for kind in KINDS]
    scores = scores.with_columns(effects)
    uses = scores.join(images, "sample", maintain_order="left").sort("step", maintain_order=True)
    return uses.with_columns(
        place=pl.int_range(1, pl.len() + 1).over("image"),
        part=pl.col("step") * PARTS // (pl.col("step").max() + 1),
    )


def _make_plan(folder: Path, seed: int) -> Plan:
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


def _write_data(out: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    pixels, labels = read_images("mnist")
    order = rng.permutation(len(pixels))
    repeated = [copies for copies in COPIES for _ in range(EACH)]
    counts = repeated + [1] * (IMAGES - len(repeated))
    samples = [
        {"__key__": f"image-{number:05d}-{copy}"}
        | _members(pixels, labels, order[number], {"image": number, "copies": count})
        for number, count in enumerate(counts)
        for copy in range(count)
    ]
    write_shards(str(out / "train-%06d.tar"), samples, 1)
    target = [
        {"__key__": f"t-{row:05d}"} | _members(pixels, labels, row, {})
        for row in order[IMAGES : IMAGES + TARGET]
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

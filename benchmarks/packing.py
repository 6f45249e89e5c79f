"""Scores of documents that share rows, against scores of the same documents in rows of their own.

    python -m benchmarks.packing [--seeds 5] [--documents 400]

A Llama of 2 layers with LoRA is trained on pieces of text of different lengths and recorded, under
`Trainer` (packed: padding-free batches) and under TRL's `SFTTrainer` (packed: `packing=True`), in
float32, in bfloat16 and with gradient checkpointing. The unpacked training has the same documents
in every step, padded. A score is a document's predicted effect on the loss of the target at the
stage's end. Two trainings are compared by the Spearman correlation of their scores, with and
without those of the first step, and by the largest difference of a score, relative to the root mean
square of all. In its first step Adam moves every number by the learning rate times the sign of its
gradient, so the effect of a sample changes abruptly where a gradient is nearly zero.

The limit is what rounding alone does: the unpacked training with the documents of each step in
reverse order. For bfloat16, both trainings are also compared with float32.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import tempfile
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
import polars as pl
import torch
import transformers
import trl
from datasets import disable_progress_bars
from scipy.stats import spearmanr

from benchmarks.packed_trainers import (
    SETTINGS,
    find_steps,
    make_documents,
    make_plan,
    train,
)
from benchmarks.timing import format_spread
from secateur.flows.stage import score_stage
from secateur.flows.workers import InlineWorkers
from secateur.tasks.results.valuation_results import read_scores
from secateur.tasks.run import Run

KINDS = ("Trainer", "SFTTrainer")


class Agreement(NamedTuple):
    """Two trainings' scores of the same documents.

    Attributes:
        spearman: their correlation by rank.
        later: the same without the first step.
        largest: the largest difference, relative to the root mean square score.
    """

    spearman: float
    later: float
    largest: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--documents", type=int, default=400)
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    disable_progress_bars()
    torch.set_num_threads(1)
    print(
        f"torch {torch.__version__}, transformers {transformers.__version__}, trl "
        f"{trl.__version__}, {options.documents} documents, {options.seeds} seeds; median (least "
        f"to greatest)\n",
        flush=True,
    )
    found: dict[tuple[str, str], list[Agreement]] = {}
    for seed in range(options.seeds):
        with tempfile.TemporaryDirectory(prefix="packing-") as name:
            for row, agreement in _measure(Path(name), seed, options.documents).items():
                found.setdefault(row, []).append(agreement)
    print("| training | compared with | Spearman | after the first step | largest difference |")
    print("|---|---|---|---|---|")
    for (training, reference), values in found.items():
        correlations = [
            format_spread([one.spearman for one in values], 4),
            format_spread([one.later for one in values], 4),
        ]
        largest = [one.largest for one in values]
        spread = f"{statistics.median(largest):.1e} ({min(largest):.1e} to {max(largest):.1e})"
        print(f"| {training} | {reference} | {' | '.join(correlations)} | {spread} |")


def _measure(folder: Path, seed: int, count: int) -> dict[tuple[str, str], Agreement]:
    """Return the agreements of one seed, by the training and what it is compared with."""
    documents = make_documents(folder, count, seed)
    rows, steps = find_steps(documents, seed)
    reverse = [step[::-1] for step in steps]
    found = {}
    for kind in KINDS:
        scores: dict[str, pl.DataFrame] = {}
        for setting in SETTINGS:
            batches = {
                "unpacked": steps,
                "reversed": reverse,
                "packed": rows if kind == "SFTTrainer" else steps,
            }
            for name, own in batches.items():
                plan = make_plan(folder, f"{kind}-{setting}-{name}", seed, len(own))
                packed = name == "packed"
                scores[f"{setting} {name}"] = _score(
                    train(plan, documents, own, kind, packed, setting)
                )
            unpacked = scores[f"{setting} unpacked"]
            for name in ("packed", "reversed"):
                training = f"{kind}, {setting}, {name}"
                found[training, "unpacked"] = _compare(scores[f"{setting} {name}"], unpacked)
        for name in ("unpacked", "packed"):
            found[f"{kind}, bf16, {name}", "float32, unpacked"] = _compare(
                scores[f"bf16 {name}"], scores["float32 unpacked"]
            )
    return found


def _score(run: Run) -> pl.DataFrame:
    """Return the score of every use of a document: columns `step`, `key` and `score_manual`."""
    score_stage(InlineWorkers(), run.url, 0)
    return read_scores(run, 0).sort("step", "key")


def _compare(one: pl.DataFrame, other: pl.DataFrame) -> Agreement:
    used = ["step", "key"]
    assert one.select(used).equals(other.select(used)), "the trainings differ in their documents"
    a, b = (scores["score_manual"].to_numpy() for scores in (one, other))
    largest = np.abs(a - b).max() / np.sqrt(np.square(b).mean())
    later = (one["step"] > 0).to_numpy()
    return Agreement(
        float(spearmanr(a, b).statistic),
        float(spearmanr(a[later], b[later]).statistic),
        float(largest),
    )


if __name__ == "__main__":
    main()

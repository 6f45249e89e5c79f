"""Are copies found, and do the scores of a group's members add up?

`python -m benchmarks.groups [images texts] [--seeds 5] [--json FILE]` trains on 2,200 samples, of
which 600 are copies of others: 150 are the same, and 150 each are changed in one of three ways.
Images are of MNIST: a little noise, less light, or a shift by one pixel. Texts are of the text
example, 65 bytes each: one byte is replaced, three bytes, or eight consecutive ones.

The first table has the precision and recall of pairs that end up in one group, at several
similarities, and the recall of each kind of copy. Below are two other ways to compare samples, each
at the threshold that is best for it. The second table has the sum of the members' scores, by
embedding and by replay, divided by the change of the target's loss when the stage is trained again
without the whole group, and Spearman's correlation of both over the groups. Cells are medians over
seeds (least to greatest).
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from scipy.stats import spearmanr

from benchmarks.arms import start_scored
from benchmarks.mislabelled import read_images
from benchmarks.timing import format_spread
from examples.shards import write_shards
from examples.text.make_shards import BYTES, read_domains
from secateur.tasks.analysis.groups import value_groups
from secateur.tasks.data.samples import read_stage_samples
from secateur.tasks.engine.progress import print_status
from secateur.tasks.plan import Plan
from secateur.tasks.results.valuation_results import read_embeddings, read_scores
from secateur.tasks.run import Run
from secateur.tasks.valuation.copies import SIMILARITY, find_copies
from secateur.tasks.valuation.target_gradients import (
    differentiate_samples,
    loop_at_stage_end,
    split_for_gradients,
)

SINGLE, COPIED, TARGET = 1600, 150, 200
SIMILARITIES = (0.8, 0.9, 0.95, 0.98)
CHANGES = {"images": ("noise", "light", "shift"), "texts": ("1 byte", "3 bytes", "8 bytes")}
LABELS = {"images": "cls", "texts": "json:domain"}
REMOVALS = 10
# The last two ways to compare, at their best threshold.
OTHERS = ("embeddings, last use", "gradients, not whitened")
Members = dict[str, Any]


def study(kind: str, folder: Path, seed: int) -> dict[str, Any]:
    """Return what is found, and the sums and removals of groups, for one seed."""
    rng = np.random.default_rng(seed)
    make = _make_images if kind == "images" else _make_texts
    pool, target = make(rng)
    samples = [(number, "none", pool[number]) for number in range(len(pool))]
    for place, change in enumerate(("exact", *CHANGES[kind])):
        for number in range(place * COPIED, (place + 1) * COPIED):
            samples.append((number, change, _change(pool[number], change, rng)))
    samples = [samples[place] for place in rng.permutation(len(samples))]
    members = [{"__key__": f"s-{place:04d}", **own} for place, (_, _, own) in enumerate(samples)]
    write_shards(f"{folder}/train-%d.tar", members, 1)
    named = [{"__key__": f"t-{place:04d}", **own} for place, own in enumerate(target)]
    write_shards(f"{folder}/target-%d.tar", named, 1)
    run = start_scored(_make_plan(kind, folder, seed))
    origins = np.array([number for number, _, _ in samples])
    changes = np.array([change for _, change, _ in samples])
    return {
        "found": _measure_found(run, origins, changes),
        "groups": {
            "copies": _measure_sums(run, "duplicates"),
            LABELS[kind]: _measure_sums(run, LABELS[kind]),
        },
    }


def _make_images(rng: np.random.Generator) -> tuple[list[Members], list[Members]]:
    pixels, labels = read_images("mnist")
    order = rng.permutation(len(pixels))[: SINGLE + TARGET]
    members = [{"raw": pixels[row].tobytes(), "cls": str(labels[row])} for row in order]
    return members[:SINGLE], members[SINGLE:]


def _make_texts(rng: np.random.Generator) -> tuple[list[Members], list[Members]]:
    members = []
    for domain, text in read_domains().items():
        pieces = [text[start : start + BYTES] for start in range(0, len(text) - BYTES, BYTES)]
        count = -(-(SINGLE + TARGET) // 3)
        # The texts themselves repeat some pieces, and those would be found as well.
        different = sorted(set(pieces))
        chosen = [different[row] for row in rng.permutation(len(different))[:count]]
        members += [{"txt": piece, "json": {"domain": domain}} for piece in chosen]
    mixed = [members[row] for row in rng.permutation(len(members))]
    return mixed[:SINGLE], mixed[SINGLE : SINGLE + TARGET]


def _change(members: Members, change: str, rng: np.random.Generator) -> Members:
    """A copy of a sample that is changed in one way."""
    if "raw" in members:
        image = np.frombuffer(members["raw"], np.uint8).reshape(28, 28).astype(float)
        if change == "noise":
            image = image + rng.normal(0, 10, image.shape)
        elif change == "light":
            image = image * 0.9
        elif change == "shift":
            image = np.roll(image, 1, axis=1)
        return {**members, "raw": image.round().clip(0, 255).astype(np.uint8).tobytes()}
    text = np.frombuffer(members["txt"], np.uint8).copy()
    if change == "8 bytes":
        start = rng.integers(BYTES - 8)
        text[start : start + 8] = rng.integers(97, 123, 8)
    elif change != "exact":
        places = rng.choice(BYTES, int(change[0]), replace=False)
        text[places] = rng.integers(97, 123, len(places))
    return {**members, "txt": text.tobytes()}


def _make_plan(kind: str, folder: Path, seed: int) -> Plan:
    models: dict[str, dict[str, Any]] = {
        "images": {
            "model": {"factory": "examples.images.model:mlp", "args": {"hidden": 128}},
            "task": {"factory": "benchmarks.mislabelled:Pictures"},
            "optimizer": {"kind": "sgd", "lr": 0.1},
            "stages": [{"epochs": 3, "batch_size": 32}],
        },
        "texts": {
            "model": {
                "factory": "examples.text.model:Transformer",
                "args": {"width": 64, "heads": 4, "layers": 2, "tied": True},
            },
            "task": {"factory": "examples.text.task:NextByte"},
            "optimizer": {"kind": "sgd", "lr": 0.3, "momentum": 0.9, "clip_norm": 1.0},
            "stages": [{"epochs": 2, "batch_size": 32}],
        },
    }
    return Plan.model_validate(
        {
            "run": "run",
            "root": str(folder),
            "seed": seed,
            "threads": 1,
            "data": {"shards": f"{folder}/train-0.tar"},
            "targets": {"clean": {"shards": f"{folder}/target-0.tar"}},
            "schedule": {"kind": "cosine", "warmup": 0.1},
            **models[kind],
        }
    )


def _measure_found(run: Run, origins: np.ndarray, changes: np.ndarray) -> dict[str, Any]:
    """Precision and recall of pairs, and recall by the kind of change."""
    firsts, seconds = np.triu_indices(len(origins), 1)
    is_copy = origins[firsts] == origins[seconds]
    rows = {}
    for similarity in SIMILARITIES:
        copies = find_copies(run, 0, similarity)
        groups = np.arange(len(origins)) + len(origins)
        groups[copies["sample"].to_numpy()] = copies["group"].to_numpy()
        found = groups[firsts] == groups[seconds]
        rows[f"similarity {similarity:g}"] = _row(found, is_copy, firsts, seconds, changes)
    for name, vectors in zip(OTHERS, _other_vectors(run), strict=True):
        unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True).clip(1e-30)
        products = (unit @ unit.T)[firsts, seconds]
        order = np.argsort(-products)[: 4 * len(origins)]
        hits = np.cumsum(is_copy[order])
        best = np.argmax(2 * hits / (np.arange(1, len(order) + 1) + is_copy.sum()))
        found = np.zeros(len(products), bool)
        found[order[: best + 1]] = True
        rows[name] = _row(found, is_copy, firsts, seconds, changes)
    return rows


def _row(
    found: np.ndarray,
    is_copy: np.ndarray,
    firsts: np.ndarray,
    seconds: np.ndarray,
    changes: np.ndarray,
) -> dict[str, float]:
    row = {"precision": float(is_copy[found].mean()), "recall": float(found[is_copy].mean())}
    kinds = np.where(changes[firsts] == "none", changes[seconds], changes[firsts])[is_copy]
    for kind in sorted(set(kinds)):
        row[kind] = float(found[is_copy][kinds == kind].mean())
    return row


def _other_vectors(run: Run) -> tuple[np.ndarray, np.ndarray]:
    """The embedding of each sample's last use, and its gradient at the stage's end."""
    embeddings = torch.cat(list(read_embeddings(run.folder.stage(0).embeddings)))
    uses = read_scores(run, 0).select("sample", "step").with_row_index("row")
    last = uses.sort("step", maintain_order=True).group_by("sample").agg(pl.col("row").last())
    samples = read_stage_samples(run, 0)
    loop = loop_at_stage_end(run, 0)
    chunks = split_for_gradients(loop, samples, torch.arange(len(samples)))
    gradients = [differentiate_samples(loop, samples, rows, check=False)[0] for rows in chunks]
    return embeddings[last.sort("sample")["row"].to_list()].numpy(), torch.cat(gradients).numpy()


def _measure_sums(run: Run, by: str) -> dict[str, float]:
    """Both sums over the removal, and their correlations with it, over some groups."""
    groups = value_groups(run, by, 0, estimate="replay", top=REMOVALS, removals=REMOVALS)
    everything = value_groups(run, by, 0, top=10_000)
    embedded = {group.group: group.score for group in everything}
    removals = [group.removal or 0.0 for group in groups]
    sums = {
        "embedding": [embedded[group.group] for group in groups],
        "replay": [group.score for group in groups],
    }
    figures: dict[str, float] = {"groups": len(groups)}
    for name, values in sums.items():
        ratios = [value / removal for value, removal in zip(values, removals, strict=True)]
        figures[f"{name} / removal"] = statistics.median(ratios)
        figures[f"{name}, Spearman"] = float(spearmanr(values, removals).statistic)
    return figures


def print_tables(kind: str, results: list[dict[str, Any]]) -> None:
    """Print what was found, and how sums compare with removals."""
    print(f"\n{kind}, {len(results)} seeds; the default similarity is {SIMILARITY:g}")
    for part in ("found", "groups"):
        rows = results[0][part]
        columns = list(next(iter(rows.values())))
        print(f"\n| | {' | '.join(columns)} |\n|" + "---|" * (len(columns) + 1))
        for name in rows:
            cells = [format_spread([r[part][name][column] for r in results]) for column in columns]
            print(f"| {name} | {' | '.join(cells)} |")


def main() -> None:
    """Run every seed of each kind of data, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kinds", nargs="*", default=list(CHANGES))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    results: dict[str, list[dict[str, Any]]] = {kind: [] for kind in arguments.kinds}
    for kind, found in results.items():
        for seed in range(arguments.seeds):
            with tempfile.TemporaryDirectory() as folder:
                found.append(study(kind, Path(folder), seed))
            print_status(f"{kind}, seed {seed}: {json.dumps(found[-1])}")
        print_tables(kind, found)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""How well answers about single texts agree with replay, on two language models.

`python -m benchmarks.questions [--workload F | G] [--seeds 5] [--first 0] [--json FILE]`

Each seed trains once with every parameter recorded, in float32, into files (20 GB at most). Eight
validation texts are asked about. For each, replay of the training gives the effect of leaving out
each use. Rows are estimates of the same, by a question that is pulled back through the record, in
all coordinates, in those of most energy, or in the principal directions of the recorded gradients.
Columns are Spearman's correlation with replay (the median of the eight), the share of replay's 50
most helpful uses that are among the estimate's best 1,000 and best 2,000, and the share of the
question's squared gradient that is held: the median over seeds (least to greatest).

F is a byte-level transformer of 120,576 parameters (200 steps), G a Llama of 0.53M parameters on
byte-pair tokens (140 steps); both have AdamW with a warm-up and a cosine.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.larger import make_bpe_text, make_text
from benchmarks.record import (
    SEGMENT,
    SIGNS,
    CurvatureOf,
    Record,
    agreement,
    read_gradients,
    read_segment_gradients,
    record_training,
    replay,
    walk_record,
)
from benchmarks.timing import format_spread
from benchmarks.workloads import Workload
from secateur.influence.coordinate_basis import share_coefficients
from secateur.influence.curvature import EmpiricalFisher, Fisher, NoCurvature
from secateur.influence.principal_directions import principal_directions

QUESTIONS = 8
FIRST, BEST = 50, (1000, 2000)
DRAWS = {"F": 4, "G": 2}  # with labels drawn from the model
MOST_DIRECTIONS = 2048
Measured = tuple[float, ...]


@dataclass
class Trained:
    """A recorded training, and what several rows need of it.

    Attributes:
        truth: by replay, the effect of every use on each question, `questions uses`.
        directions: by how many coordinates they are chosen from.
    """

    record: Record
    truth: Tensor
    directions: dict[int | None, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Row:
    """An estimate.

    Attributes:
        curvature: its kind.
        draws: how many batches of drawn labels count per step; 0 means random signs.
        coordinates: how many, of most energy in the first segment; all if None.
        equal: whether every block gets as many, of most energy in 10 steps.
        coupled: whether blocks are coupled.
        directions: how many numbers an embedding has; as many as coordinates if None.
        texts: how many texts of each step the curvature is estimated from; all if None.
    """

    curvature: CurvatureOf = Fisher
    draws: int = 0
    coordinates: int | None = None
    equal: bool = False
    coupled: bool = True
    directions: int | None = None
    texts: int | None = None


ROWS = {
    "all, no curvature": Row(NoCurvature),
    "all, one gradient per text": Row(EmpiricalFisher),
    "all, signs": Row(),
    "all, signs of 4 texts per step": Row(texts=4),
    "all, signs of 1 text per step": Row(texts=1),
    "all, 1 draw": Row(draws=1),
    "all, 2 draws": Row(draws=2),
    "all, 4 draws": Row(draws=4),
    "2,048, equal, one gradient per text, block": Row(
        EmpiricalFisher, coordinates=2048, equal=True, coupled=False
    ),
    "2,048, signs, block": Row(coordinates=2048, coupled=False),
    "2,048, 2 draws": Row(draws=2, coordinates=2048),
    "8,192, signs, block": Row(coordinates=8192, coupled=False),
    "8,192, 2 draws": Row(draws=2, coordinates=8192),
    "32,768 in 2,048 directions, signs": Row(coordinates=32768, directions=2048),
    "all in 512 directions, signs": Row(directions=512),
    "all in 2,048 directions, signs": Row(directions=2048),
    "all in 512 directions, 2 draws": Row(draws=2, directions=512),
    "all in 2,048 directions, 2 draws": Row(draws=2, directions=2048),
    "all in 2,048 directions, 4 draws": Row(draws=4, directions=2048),
}


def choose(record: Record, row: Row) -> Tensor | None:
    """Return the coordinates of a row, or None if it has all."""
    if row.coordinates is None:
        return None
    gradients = read_segment_gradients(record.segments[0])
    if not row.equal:
        energy = gradients.square().sum(0)
        return energy.topk(row.coordinates).indices.sort().values
    energy = gradients[: len(gradients) * 10 // SEGMENT].square().sum(0)
    shares = share_coefficients([s.stop - s.start for s in record.spans], row.coordinates)
    pairs = zip(record.spans, shares, strict=True)
    return torch.cat([energy[s].topk(n).indices.sort().values + s.start for s, n in pairs])


def answer(trained: Trained, row: Row) -> tuple[Tensor, Tensor]:
    """Return an estimate, `questions uses`, and the part of the questions that it holds.

    Embeddings in directions score a question as its part in the directions is scored.
    """
    record = trained.record
    places = choose(record, row)
    held = record.questions if places is None else record.questions[:, places]
    if row.directions is not None:
        if row.coordinates not in trained.directions:
            found = principal_directions(read_gradients(record, places), MOST_DIRECTIONS)
            trained.directions[row.coordinates] = found
        directions = trained.directions[row.coordinates][:, : row.directions]
        held = (held @ directions) @ directions.T
    draws = [] if row.curvature is not Fisher else [*map(str, range(row.draws))] or [SIGNS]
    return walk_record(record, held, row.curvature, draws, places, row.coupled, row.texts), held


def measure(trained: Trained, row: Row) -> Measured:
    """Return a row's correlation, shares of the first uses found, and share of the gradient."""
    scores, held = answer(trained, row)
    pairs = list(zip(scores, trained.truth, strict=True))
    found = [
        statistics.median(
            float(torch.isin(b.topk(FIRST).indices, a.topk(best).indices).float().mean())
            for a, b in pairs
        )
        for best in BEST
    ]
    share = held.square().sum(1) / trained.record.questions.square().sum(1)
    return agreement(scores, trained.truth), *found, float(share.median())


def measure_seed(
    make: Callable[[int], Workload], seed: int, rows: dict[str, Row]
) -> list[Measured]:
    """Train once, and return every row's figures."""
    draws = max(row.draws for row in rows.values())
    with tempfile.TemporaryDirectory() as folder:
        record = record_training(in_float32(make(seed)), QUESTIONS, draws, Path(folder))
        trained = Trained(record, replay(record))
        found = []
        for name, row in rows.items():
            found.append(measure(trained, row))
            print(seed, name, *(f"{value:.3f}" for value in found[-1]), flush=True)
    return found


def in_float32(workload: Workload) -> Workload:
    """Return a workload in float32, which takes half the memory of float64."""
    return replace(
        workload,
        model=lambda: workload.model().float(),
        losses=lambda model, ids: workload.losses(model, ids).double(),
    )


def main() -> None:
    """Print one line per estimate."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workload", choices=["F", "G"], default="F")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    make = {"F": make_text, "G": make_bpe_text}[arguments.workload]
    rows = {name: row for name, row in ROWS.items() if row.draws <= DRAWS[arguments.workload]}
    seeds = range(arguments.first, arguments.first + arguments.seeds)
    results = [measure_seed(make, seed, rows) for seed in seeds]
    by_row = dict(zip(rows, zip(*results, strict=True), strict=True))
    names = ["Spearman", *(f"50 in best {best:,}" for best in BEST), "gradient held"]
    print(f"{'coordinates, curvature':48}" + "".join(f"{name:24}" for name in names))
    for name, values in by_row.items():
        columns = [format_spread([v[i] for v in values]) for i in range(len(names))]
        print(f"{name:48}" + "".join(f"{column:24}" for column in columns))
    if arguments.json:
        arguments.json.write_text(json.dumps(by_row, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""Whether weights fitted on replayed questions make answers to other questions better.

`python -m benchmarks.calibration [--workload F | G] [--seeds 5] [--first 0] [--json FILE]`

Trains as `benchmarks.questions` does, and asks about twelve validation texts. An estimate (all
coordinates, random signs) is divided into parts: by segment of the training, by block of
parameters, by both, or by band of the principal directions in which the question lies. One weight
per part is fitted to replay's effects on six of the questions, by least squares with a small ridge
towards 1, and tested on the other six; then the other way round. Printed is Spearman's correlation
with replay, the median of the twelve, without weights and with each kind of them.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.larger import make_bpe_text, make_text
from benchmarks.questions import in_float32
from benchmarks.record import (
    SEGMENT,
    SIGNS,
    Record,
    agreement,
    read_gradients,
    record_training,
    replay,
    walk_record,
)
from benchmarks.timing import format_spread
from benchmarks.workloads import Workload
from secateur.influence.curvature import Fisher
from secateur.influence.principal_directions import principal_directions
from secateur.influence.segment import Segment

QUESTIONS = 12
BANDS = (64, 256, 1024, 2048)  # where each band of directions ends; the rest is one more
RIDGE = 0.01


class EffectsByBlock:
    """The Fisher curvature, which notes each block's part of every effect on its way.

    Attributes:
        effects: of every record of the segment, `records questions blocks`.
    """

    def __init__(self, segment: Segment, spans: Sequence[slice], blocks: Sequence[slice]) -> None:
        self._segment = segment
        self._blocks = blocks
        self._fisher = Fisher(segment, spans)
        self.effects = torch.zeros(0)

    def product(self, step: int, span: slice, a: Tensor, e: Tensor) -> Tensor | None:
        rows = self._segment.rows(step)
        if not len(self.effects):
            records = len(self._segment.contributions)
            self.effects = a.new_zeros(records, len(a), len(self._blocks))
        for number, block in enumerate(self._blocks):
            contributions = self._segment.contributions[rows, block]
            self.effects[rows, :, number] = contributions @ a[:, block].T
        return self._fisher.product(step, span, a, e)


def parts_by_block(record: Record) -> Tensor:
    """Return each block's part of the estimate, `questions uses blocks`."""
    found: list[EffectsByBlock] = []

    def curvature(segment: Segment, spans: list[slice]) -> EffectsByBlock:
        found.append(EffectsByBlock(segment, spans, record.spans))
        return found[-1]

    walk_record(record, record.questions, curvature, [SIGNS], None, True)
    return torch.cat([part.effects for part in reversed(found)]).transpose(0, 1).double()


def parts_by_band(record: Record) -> Tensor:
    """Return the estimate of each band of the questions' gradients, `questions uses bands`."""
    directions = principal_directions(read_gradients(record), BANDS[-1])
    rest = record.questions
    parts = []
    for start, stop in zip((0, *BANDS[:-1]), BANDS, strict=True):
        band = directions[:, start:stop]
        parts.append(record.questions @ band @ band.T)
        rest = rest - parts[-1]
    scores = [walk_record(record, part, Fisher, [SIGNS], None, True) for part in (*parts, rest)]
    return torch.stack(scores, 2).double()


def split_by_segment(parts: Tensor, batch: int) -> Tensor:
    """Return parts of which each is divided by segments, `questions uses (segments parts)`."""
    uses = parts.shape[1]
    segments = torch.arange(uses) // (batch * SEGMENT)
    own = torch.nn.functional.one_hot(segments).to(parts)
    return (parts[:, :, None] * own[None, :, :, None]).flatten(2)


def fit_weights(parts: Tensor, truth: Tensor) -> Tensor:
    """Return one weight per part, fitted to the truth of some questions.

    Each question counts alike. Weights are drawn to the best common weight, so that parts of
    which little is known keep it.
    """
    scale = truth.norm(dim=1)
    x = (parts / scale[:, None, None]).flatten(0, 1)
    y = (truth / scale[:, None]).flatten()
    total = x.sum(1)
    common = float(total @ y / (total @ total))
    gram = x.T @ x
    ridge = RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    return torch.linalg.solve(gram + ridge, x.T @ y + ridge.sum(1) * common)


def agreement_elsewhere(parts: Tensor, truth: Tensor) -> float:
    """Return the correlation on questions that the weights were not fitted on."""
    first, second = slice(0, len(parts) // 2), slice(len(parts) // 2, None)
    scores = [
        parts[test] @ fit_weights(parts[fit], truth[fit])
        for test, fit in ((first, second), (second, first))
    ]
    return agreement(torch.cat(scores), truth)


def measure_seed(make: Callable[[int], Workload], seed: int) -> dict[str, float]:
    """Train once, and return the correlation with each kind of weights."""
    with tempfile.TemporaryDirectory() as folder:
        record = record_training(in_float32(make(seed)), QUESTIONS, 0, Path(folder))
        truth = replay(record).double()
        batch = len(record.workload.batches[0])
        blocks = parts_by_block(record)
        bands = parts_by_band(record)
    return {
        "no weights": agreement(blocks.sum(2), truth),
        "by segment": agreement_elsewhere(
            split_by_segment(blocks.sum(2, keepdim=True), batch), truth
        ),
        "by block": agreement_elsewhere(blocks, truth),
        "by segment and block": agreement_elsewhere(split_by_segment(blocks, batch), truth),
        "by band": agreement_elsewhere(bands, truth),
        "by segment and band": agreement_elsewhere(split_by_segment(bands, batch), truth),
    }


def main() -> None:
    """Print one line per kind of weights."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workload", choices=["F", "G"], default="F")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    make = {"F": make_text, "G": make_bpe_text}[arguments.workload]
    results = []
    for seed in range(arguments.first, arguments.first + arguments.seeds):
        results.append(measure_seed(make, seed))
        print(seed, *(f"{name} {value:.3f};" for name, value in results[-1].items()), flush=True)
    for name in results[0]:
        print(f"{name:24}{format_spread([result[name] for result in results])}")
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()

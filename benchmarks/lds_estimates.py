"""Our estimates for `benchmarks.lds`, from one recorded training with every parameter recorded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from benchmarks.record import (
    SIGNS,
    Record,
    read_gradients,
    read_segment_gradients,
    replay,
    walk_record,
)
from secateur.influence.curvature import Fisher
from secateur.influence.principal_directions import principal_directions


def pull_back_all(record: Record) -> Tensor:
    """Return the effect of every use on each question, pulled back in all coordinates."""
    return walk_record(record, record.questions, Fisher, [SIGNS], None, coupled=True)


def embed(record: Record, coefficients: int) -> Tensor:
    """Return the effect of every use by embeddings of coordinates.

    Coordinates are those of most energy in the first segment, over the whole model, and blocks are
    not coupled.
    """
    energy = read_segment_gradients(record.segments[0]).square().sum(0)
    places = energy.topk(min(coefficients, len(energy))).indices.sort().values
    gradients = record.questions[:, places]
    return walk_record(record, gradients, Fisher, [SIGNS], places, coupled=False)


def embed_directions(record: Record, count: int) -> Tensor:
    """Return the effect of every use by embeddings of principal directions of all coordinates."""
    directions = principal_directions(read_gradients(record), count)
    gradients = (record.questions @ directions) @ directions.T
    return walk_record(record, gradients, Fisher, [SIGNS], None, coupled=True)


# Every estimate gives `questions uses`; a sample's score is the sum over its uses.
ESTIMATES: dict[str, Callable[[Record], Tensor]] = {
    "replay": replay,
    "pull-back, all coordinates": pull_back_all,
    "embedding, 2,048 coordinates": partial(embed, coefficients=2048),
    "embedding, 512 directions": partial(embed_directions, count=512),
}


def sum_over_uses(effects: Tensor, batches: Sequence[Tensor], samples: int) -> Tensor:
    """Return each sample's score, `questions samples`, from the effects of its uses."""
    scores = torch.zeros(len(effects), samples, dtype=torch.float64)
    return scores.index_add_(1, torch.cat(list(batches)), effects.double())

"""Embeddings in fewer numbers than the basis has coefficients.

Each direction that embeddings are reduced to is taken back through the ledgers, as a question is.
What it would say of every use is a number of that use's embedding. This needs no matrix of the
coefficients' square, so a basis may have as many coefficients as the disk has room for.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from secateur.influence.recursion import walk_segment
from secateur.storage.attempt import Attempt
from secateur.storage.tensors import read_tensors, write_tensors
from secateur.tasks.engine.progress import track
from secateur.tasks.results.valuation_results import (
    TRANSITION,
    coupled_spans,
    pack_tensors,
    read_directions,
    segment_file,
)
from secateur.tasks.run import Run
from secateur.tasks.valuation.dynamics import count_slots, plan_dynamics, read_segment

GROUP_ELEMENTS = 1 << 25  # of the directions that are taken back together, with their slots


def count_groups(run: Run, stage: int) -> int:
    """Return in how many groups the stage's directions are taken back."""
    directions = run.folder.stage(stage).components.manifest.facts["directions"]
    return -(-int(directions) // group_size(_size(run), count_slots(run)))


def group_size(coefficients: int, slots: int) -> int:
    """Return how many directions are taken back together."""
    return max(1, GROUP_ELEMENTS // (coefficients * slots))


def embed_group(run: Run, stage: int, number: int) -> None:
    """Write a group's numbers of every use's embedding, and its part of the transition."""
    folder = run.folder.stage(stage)

    def write(attempt: Attempt) -> None:
        size = group_size(_size(run), count_slots(run))
        directions = read_directions(run, stage)[:, number * size : (number + 1) * size]
        later = []
        for span in coupled_spans(run):
            matrix = directions.new_zeros(
                directions.shape[1], count_slots(run), span.stop - span.start
            )
            matrix[:, 0] = directions[span].T
            later.append(matrix)
        ledgers = list(enumerate(folder.segments()))
        what = f"stage {stage}, embedding"
        for place, ledger in track(reversed(ledgers), what, len(ledgers)):
            effects, later = walk_segment(plan_dynamics(run, read_segment(ledger)), later)
            embeddings = torch.stack(effects).sum(0)
            write_tensors(attempt, segment_file(place), {"embeddings": embeddings}, {})
        if stage > 0:
            # The stage began with an empty state, so only theta leads to the stage before.
            theta = torch.cat([matrix[:, 0] for matrix in later], 1)
            write_tensors(attempt, TRANSITION, {"theta": theta}, {})

    inputs = {"components": folder.components.fingerprint}
    folder.embedded(number).write_once("a part of the embeddings", inputs, write)


def collect_groups(run: Run, stage: int, attempt: Attempt) -> int:
    """Write the stage's embeddings from those of all groups.

    Returns:
        Number of embeddings.
    """
    folder = run.folder.stage(stage)
    groups = [folder.embedded(number) for number in range(count_groups(run, stage))]

    def join(name: str, key: str, dim: int) -> Float[Tensor, "_ _"]:
        return torch.cat([read_tensors(group, name)[key] for group in groups], dim)

    rows = 0
    for number in range(len(folder.segments())):
        name = segment_file(number)
        embeddings = join(name, "embeddings", 1)
        write_tensors(attempt, name, {"embeddings": embeddings}, {})
        rows += len(embeddings)
    if stage > 0:
        theta = join(TRANSITION, "theta", 0)
        write_tensors(attempt, TRANSITION, pack_tensors([theta[:, None]]), {})
    return rows


def _size(run: Run) -> int:
    size: int = coupled_spans(run)[-1].stop
    return size

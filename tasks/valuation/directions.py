"""The directions that a stage's embeddings are reduced to, if the plan names `components`."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from secateur.influence.principal_directions import principal_directions
from secateur.storage.attempt import Attempt
from secateur.storage.tensors import write_tensors
from secateur.tasks.results.valuation_results import DIRECTIONS
from secateur.tasks.run import Run
from secateur.tasks.valuation.dynamics import read_segment

GRADIENTS = 2  # gradients per direction that the directions are found from


def choose_directions(run: Run, stage: int) -> int:
    """Find the directions in which the gradients of a stage's uses vary most.

    Returns:
        Number of directions.
    """
    folder = run.folder.stage(stage)
    components = run.plan.components
    assert components is not None

    def write(attempt: Attempt) -> None:
        directions = principal_directions(_some_gradients(run, stage, components), components)
        write_tensors(attempt, DIRECTIONS, {"directions": directions}, {})
        attempt.facts["directions"] = directions.shape[1]

    inputs = {f"segment {n}": ledger.fingerprint for n, ledger in enumerate(folder.segments())}
    manifest = folder.components.write_once("components", inputs, write)
    return int(manifest.facts["directions"])


def _some_gradients(run: Run, stage: int, components: int) -> Float[Tensor, "n p"]:
    """The contributions of evenly spaced uses of the stage."""
    ledgers = run.folder.stage(stage).segments()
    counts = [int(read_segment(ledger).selected.sum()) for ledger in ledgers]
    total = sum(counts)
    wanted = torch.linspace(0, total - 1, min(total, GRADIENTS * components)).round().long()
    parts = []
    start = 0
    for ledger, count in zip(ledgers, counts, strict=True):
        own = wanted[(wanted >= start) & (wanted < start + count)] - start
        segment = read_segment(ledger)
        parts.append(segment.contributions[segment.selected.nonzero().flatten()[own]])
        start += count
    return torch.cat(parts)

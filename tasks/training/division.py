"""The division of a step's batch among processes and micro-batches."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Int
from torch import Tensor

from secateur.tasks.data.seeds import seed_for


@dataclass(frozen=True)
class Part:
    """The samples that pass through the model together.

    Attributes:
        rows: of the stage's sample table.
        is_idle: whether they only keep a process in step with the others, which have more samples.
            They then count for nothing.
    """

    rows: Int[Tensor, " batch"]
    is_idle: bool = False


def divide_batch(
    rows: Int[Tensor, " batch"], processes: int, micro_batches: int
) -> list[list[Part]]:
    """Return each process's parts of a step's batch.

    The parts of all processes, one after the other, are the batch in its order. Every process has
    equally many parts, because processes exchange gradients once per part.
    """
    shares = rows.tensor_split(processes)
    divided = [
        [Part(part) for part in share.chunk(min(micro_batches, len(share)))] if len(share) else []
        for share in shares
    ]
    longest = max(len(parts) for parts in divided)
    idle = Part(rows[:1], is_idle=True)
    return [parts + [idle] * (longest - len(parts)) for parts in divided]


def process_seed(seed: int, rank: int) -> int:
    """Return the seed of a process's random draws in a step whose seed is given.

    The first process draws what a single one would draw.
    """
    return seed_for(seed, "rank", rank) if rank else seed

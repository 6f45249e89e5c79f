"""Bring the records of several processes together, as one process would have recorded them."""

from __future__ import annotations

import torch
from torch import Tensor

from secateur.influence.process_group import Ranks

Columns = dict[str, Tensor]


def gather_records(
    records: Columns, steps: Columns, curvature: Columns, ranks: Ranks
) -> tuple[Columns, Columns, Columns]:
    """Return the tensors of all processes' segment in the first process; no records in the others.

    The records of a step are in the order of the processes, and within a process in its own order.

    Args:
        records: this process's fields of a segment with one row per record, sorted by step.
        steps: those with one row per step. They are the same in every process but for the stride,
            which is 0 where the process had no sample.
        curvature: those of the curvatures that need more than the records.
    """
    records = _gather_by_step(records, records["steps"], ranks)
    records["positions"] = _positions(records["steps"])
    fisher = {name: tensor for name, tensor in curvature.items() if name.startswith("fisher")}
    fisher = _gather_by_step(fisher, fisher["fisher_steps"], ranks)
    strides = ranks.gather(steps["strides"])
    if strides:
        steps = steps | {"strides": torch.stack(strides).amax(0)}
    return records, steps, curvature | fisher


def _gather_by_step(columns: Columns, steps: Tensor, ranks: Ranks) -> Columns:
    """The rows of all processes, sorted by step; none in all processes but the first."""
    order = _order(ranks.gather(steps))
    gathered = {}
    for name, own in columns.items():
        # One column after the other, so that the first process holds only one of them twice.
        tensors = ranks.gather(own)
        gathered[name] = torch.cat(tensors)[order] if tensors else own[:0]
    return gathered


def _order(steps: list[Tensor]) -> Tensor:
    return torch.cat([torch.empty(0, dtype=torch.int64), *steps]).argsort(stable=True)


def _positions(steps: Tensor) -> Tensor:
    """The place of each record among those of its step, if they are sorted by step."""
    _, counts = steps.unique_consecutive(return_counts=True)
    starts = (counts.cumsum(0) - counts).repeat_interleave(counts)
    places: Tensor = torch.arange(len(steps)) - starts
    return places

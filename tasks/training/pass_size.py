"""How many samples pass through the model at a time, outside of training steps."""

from __future__ import annotations

from collections.abc import Callable

from jaxtyping import Int
from torch import Tensor

from secateur.influence.memory_meter import measure_peak
from secateur.storage.shards import Samples
from secateur.tasks.plan import Plan

# Larger passes take no less time per sample.
LARGEST_PASS = 256
MEBIBYTE = 1 << 20


def split_by_memory(
    plan: Plan,
    samples: Samples,
    rows: Int[Tensor, " n"],
    run_pass: Callable[[Int[Tensor, " m"]], object],
) -> list[Int[Tensor, " m"]]:
    """Split rows into passes that take at most the plan's `pass_memory`, or one sample each.

    A pass of one sample and one of two are run and measured. They have the samples of the most
    bytes, because batches are padded to their longest sample. What is counted depends on shapes
    only, so a rerun splits alike on every machine.

    Args:
        run_pass: makes the pass of some rows.
    """
    largest = largest_rows(samples, rows)
    size = pass_size(plan, lambda count: measure_peak(lambda: run_pass(largest[:count])), len(rows))
    return list(rows.split(size))


def pass_size(plan: Plan, measure: Callable[[int], int], count: int) -> int:
    """Return how many of `count` samples make a pass within the plan's `pass_memory`.

    Args:
        measure: returns the bytes that a pass of so many samples takes at most at a time.
    """
    if count < 2:
        return 1
    one = measure(1)
    each = max(1, measure(2) - one)
    further = (plan.pass_memory * MEBIBYTE - one) // each
    return max(1, min(1 + further, LARGEST_PASS, count))


def largest_rows(samples: Samples, rows: Int[Tensor, " n"]) -> Int[Tensor, " n"]:
    """Return rows in the order of their samples' bytes, the largest first."""
    sizes = samples.frame["sizes"].list.sum().to_torch()
    return rows[sizes[rows].argsort(descending=True, stable=True)]

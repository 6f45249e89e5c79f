"""Timing in turns: alternatives run alternately in one process, so noise affects all equally."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping


def time_in_turns(
    functions: Mapping[str, Callable[[], object]], repeats: int, inner: int = 1
) -> dict[str, list[float]]:
    """Return the seconds of each function, `repeats` times in turns.

    Each is called once before, to warm up.

    Args:
        inner: calls per turn, of which the median counts.
    """
    for function in functions.values():
        function()
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats):
        turn: dict[str, list[float]] = {name: [] for name in functions}
        for _ in range(inner):
            for name, function in functions.items():
                start = time.perf_counter()
                function()
                turn[name].append(time.perf_counter() - start)
        for name, values in turn.items():
            seconds[name].append(statistics.median(values))
    return seconds


def format_spread(values: list[float], digits: int = 2) -> str:
    """Return the median, and the least and the greatest value, as text."""
    middle = statistics.median(values)
    return f"{middle:.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"

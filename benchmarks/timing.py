"""Timing by turns: what is compared runs alternately in one process, so that noise meets all of it alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping


def by_turns(
    bodies: Mapping[str, Callable[[], object]], repeats: int, inner: int = 1
) -> dict[str, list[float]]:
    """Seconds of each body, `repeats` times by turns, each time the median of `inner` calls; warmed up by one call."""
    for body in bodies.values():
        body()
    seconds: dict[str, list[list[float]]] = {name: [] for name in bodies}
    for _ in range(repeats):
        rounds: dict[str, list[float]] = {name: [] for name in bodies}
        for _ in range(inner):
            for name, body in bodies.items():
                start = time.perf_counter()
                body()
                rounds[name].append(time.perf_counter() - start)
        for name, found in rounds.items():
            seconds[name].append(found)
    return {
        name: [statistics.median(found) for found in rounds] for name, rounds in seconds.items()
    }


def spread(values: list[float], digits: int = 2) -> str:
    """Median (least to greatest)."""
    middle, low, high = statistics.median(values), min(values), max(values)
    return f"{middle:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"

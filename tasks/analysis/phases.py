"""Room `tasks`: the phases of an influence profile, warm-up, basin and ascent, by change points (docs/windows.md)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from ruptures import KernelCPD

from secateur.tasks.results.profile_results import Boundary, Phase, PhaseName, Phases

BINS = 200  # a profile is cut into at most so many bins of consecutive steps
PIECES = 6
SHORTEST = 3  # bins that a piece holds at least
LEAST_RATIO = 1.5  # between the levels of neighbouring pieces
BASIN_RATIO = (
    2.0  # neighbours of the lowest piece below so many times its level are of the basin too
)
RESAMPLES = 200
COVERAGE = 0.95


def find_phases(steps: Sequence[int], influence: Sequence[float], length: int) -> Phases:
    """Cuts a profile into pieces of constant level, in logarithms, and names them.

    The partitions of least squares into at most six pieces (Truong, Oudre and Vayatis, 2020; `ruptures`), their number by
    Bayes' criterion at three times log n a change point (the leading term of Zhang and Siegmund, 2007), among partitions
    whose neighbours differ by half at least. The lowest piece is the basin, with the neighbours that are below twice its
    level; what comes before it is the warm-up, what comes after it the ascent. The intervals of the boundaries are those
    of 200 profiles made of the pieces' levels and their residuals, drawn again within each piece.

    Args:
        steps: steps of the stage that were recorded, in order.
        influence: mean absolute influence over learning rate at each; where it is not positive the step is left out.
        length: steps of the stage.
    """
    values, recorded = np.asarray(influence, dtype=np.float64), np.asarray(steps)
    usable = np.isfinite(values) & (values > 0)
    values, places = values[usable], recorded[usable]
    nothing = Phases(steps=length, recorded=len(recorded), phases=[], boundaries=[], support=1.0)
    if not nothing.is_complete or len(values) < 2 * SHORTEST:
        return nothing
    groups = np.array_split(np.arange(len(values)), min(BINS, len(values)))
    series = np.log([values[group].mean() for group in groups])
    edges = np.array([0, *(places[group[0]] for group in groups[1:]), length])
    ends = _choose(series, _partitions(series))
    profiles = _resampled(series, ends)
    again = [_partitions(profile) for profile in profiles]
    alike = [
        _shown(p, _choose(p, cut)) == _shown(series, ends)
        for p, cut in zip(profiles, again, strict=True)
    ]
    spread = np.quantile(
        [found[len(ends) - 1] for found in again], [(1 - COVERAGE) / 2, (1 + COVERAGE) / 2], axis=0
    )
    names = _names(series, ends)
    phases = [
        Phase(
            name=name,
            start=int(edges[a]),
            stop=int(edges[b]),
            level=float(np.exp(series[a:b].mean())),
        )
        for name, a, b in zip(names, [0, *ends], ends, strict=False)
    ]
    boundaries = [
        Boundary(step=int(edges[end]), low=int(edges[int(low)]), high=int(edges[math.ceil(high)]))
        for end, low, high in zip(ends[:-1], *spread[:, :-1], strict=True)
    ]
    found = {"phases": phases, "boundaries": boundaries} if names else {}
    return nothing.model_copy(update=found | {"support": float(np.mean(alike))})


def _partitions(series: np.ndarray) -> list[list[int]]:
    """Where the pieces end in the partitions of least squares into one piece, two, and so on."""
    search = KernelCPD(kernel="linear", min_size=SHORTEST).fit(series[:, None])
    most = min(PIECES, len(series) // SHORTEST)
    larger = [
        search.predict(n_bkps=pieces - 1) for pieces in range(most, 1, -1)
    ]  # the largest answers for the others
    return [[len(series)], *reversed(larger)]


def _choose(series: np.ndarray, partitions: list[list[int]]) -> list[int]:
    """The partition of greatest criterion among those whose neighbours differ enough."""
    n = len(series)
    exact = 1e-12 * n * max(float(np.var(series)), 1e-12)  # the residual of a partition without any

    def criterion(ends: list[int]) -> float:
        parts = np.split(series, ends[:-1])
        residual = sum(float(np.var(part)) * len(part) for part in parts)
        return float(-n * np.log(max(residual, exact) / n) - 3 * (len(parts) - 1) * np.log(n))

    def differ(ends: list[int]) -> bool:
        levels = [part.mean() for part in np.split(series, ends[:-1])]
        return all(abs(step) >= math.log(LEAST_RATIO) for step in np.diff(levels))

    return max(filter(differ, partitions), key=criterion)


def _resampled(series: np.ndarray, ends: list[int]) -> list[np.ndarray]:
    """Profiles of the same pieces, each of its values at the piece's level plus a residual drawn from the piece's."""
    rng = np.random.default_rng(0)  # the same profile has the same intervals
    parts = np.split(series, ends[:-1])
    return [
        np.concatenate([rng.choice(part, len(part)) for part in parts]) for _ in range(RESAMPLES)
    ]


def _names(series: np.ndarray, ends: list[int]) -> list[PhaseName]:
    """The phase of each piece; none where all of them are of the basin."""
    levels = [float(part.mean()) for part in np.split(series, ends[:-1])]
    first = last = int(np.argmin(levels))
    below = levels[first] + math.log(BASIN_RATIO)
    while first > 0 and levels[first - 1] < below:
        first -= 1
    while last < len(levels) - 1 and levels[last + 1] < below:
        last += 1
    if (first, last) == (0, len(levels) - 1):
        return []
    return [
        "warm-up" if n < first else "basin" if n <= last else "ascent" for n in range(len(levels))
    ]


def _shown(series: np.ndarray, ends: list[int]) -> set[PhaseName]:
    """Which phases there are."""
    return set(_names(series, ends))

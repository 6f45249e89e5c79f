"""Find the phases of an influence profile (warm-up, basin, ascent) by change points."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from ruptures import KernelCPD

from secateur.tasks.results.profile_results import Boundary, Phase, PhaseName, Phases

MOST_BINS = 200  # bins of consecutive steps that a profile is averaged in
MOST_PIECES = 6
BINS_PER_PIECE = 3  # at least
LEAST_RATIO = 1.5  # between the levels of neighboring pieces
BASIN_RATIO = 2.0  # pieces next to the lowest one belong to the basin below this ratio to its level
RESAMPLES = 200
COVERAGE = 0.95

# The bin at which each piece of a partition ends.
Partition = list[int]


def find_phases(steps: Sequence[int], influence: Sequence[float], length: int) -> Phases:
    """Cut a profile into pieces of constant level, in logarithms, and name the pieces.

    `ruptures` (Truong, Oudre and Vayatis, 2020) finds the least-squares partitions into at most six
    pieces. Only partitions are considered in which the levels of neighboring pieces differ by a
    factor of at least 1.5. Bayes' criterion chooses among them, with 3 log n per change point (the
    leading term of Zhang and Siegmund, 2007).

    The lowest piece is the basin, together with neighbors below twice its level. The pieces before
    the basin are the warm-up, those after it the ascent. The intervals of the boundaries come from
    200 resampled profiles: each has the levels of the pieces, and residuals that are drawn again
    within each piece.

    Args:
        steps: the recorded steps of the stage, in order.
        influence: mean absolute influence over learning rate at each of them. A step is left out if
            its value is not positive.
        length: number of steps of the stage.
    """
    recorded = np.asarray(steps)
    values = np.asarray(influence, dtype=np.float64)
    result = Phases(steps=length, recorded=len(recorded), phases=[], boundaries=[], support=1.0)
    usable = np.isfinite(values) & (values > 0)
    if not result.is_complete or usable.sum() < 2 * BINS_PER_PIECE:
        return result
    series, edges = _bin_profile(recorded[usable], values[usable], length)
    ends = _choose_partition(series, _find_partitions(series))
    names = _name_pieces(series, ends)
    profiles = _resample(series, ends)
    partitions = [_find_partitions(profile) for profile in profiles]
    alike = [
        set(_name_pieces(profile, _choose_partition(profile, candidates))) == set(names)
        for profile, candidates in zip(profiles, partitions, strict=True)
    ]
    result.support = float(np.mean(alike))
    if names:
        result.phases = _make_phases(series, edges, ends, names)
        same_size = [candidates[len(ends) - 1] for candidates in partitions]
        result.boundaries = _make_boundaries(edges, ends, same_size)
    return result


def _bin_profile(
    steps: np.ndarray, values: np.ndarray, length: int
) -> tuple[np.ndarray, np.ndarray]:
    """The logarithm of each bin's mean, and the steps at which the bins begin and the last ends."""
    bins = np.array_split(np.arange(len(values)), min(MOST_BINS, len(values)))
    series = np.log([values[rows].mean() for rows in bins])
    edges = np.array([0, *(steps[rows[0]] for rows in bins[1:]), length])
    return series, edges


def _find_partitions(series: np.ndarray) -> list[Partition]:
    """The least-squares partitions into one piece, two pieces, and so on."""
    search = KernelCPD(kernel="linear", min_size=BINS_PER_PIECE).fit(series[:, None])
    most = min(MOST_PIECES, len(series) // BINS_PER_PIECE)
    # The largest is asked for first: `ruptures` then knows the smaller ones without a new search.
    larger = [search.predict(n_bkps=pieces - 1) for pieces in range(most, 1, -1)]
    return [[len(series)], *reversed(larger)]


def _choose_partition(series: np.ndarray, partitions: list[Partition]) -> Partition:
    """The partition with the largest criterion, among those whose pieces differ enough."""
    return max(
        (ends for ends in partitions if _pieces_differ(series, ends)),
        key=lambda ends: _bayes_criterion(series, ends),
    )


def _pieces_differ(series: np.ndarray, ends: Partition) -> bool:
    differences = np.diff(_piece_levels(series, ends))
    return all(abs(difference) >= math.log(LEAST_RATIO) for difference in differences)


def _bayes_criterion(series: np.ndarray, ends: Partition) -> float:
    n = len(series)
    pieces = np.split(series, ends[:-1])
    residual = sum(float(np.var(piece)) * len(piece) for piece in pieces)
    # A profile of exact steps has no residual, and the logarithm of 0 is infinite.
    least_residual = 1e-12 * n * max(float(np.var(series)), 1e-12)
    fit = -n * np.log(max(residual, least_residual) / n)
    return float(fit - 3 * (len(pieces) - 1) * np.log(n))


def _resample(series: np.ndarray, ends: Partition) -> list[np.ndarray]:
    """Profiles with the same pieces, whose bins are drawn again from the bins of their piece."""
    rng = np.random.default_rng(0)  # the same profile always gets the same intervals
    pieces = np.split(series, ends[:-1])
    return [
        np.concatenate([rng.choice(piece, len(piece)) for piece in pieces])
        for _ in range(RESAMPLES)
    ]


def _piece_levels(series: np.ndarray, ends: Partition) -> list[float]:
    return [float(piece.mean()) for piece in np.split(series, ends[:-1])]


def _name_pieces(series: np.ndarray, ends: Partition) -> list[PhaseName]:
    """The phase of each piece. The list is empty if all pieces belong to the basin."""
    levels = _piece_levels(series, ends)
    first = last = int(np.argmin(levels))
    basin_limit = levels[first] + math.log(BASIN_RATIO)
    while first > 0 and levels[first - 1] < basin_limit:
        first -= 1
    while last < len(levels) - 1 and levels[last + 1] < basin_limit:
        last += 1
    if (first, last) == (0, len(levels) - 1):
        return []
    names: list[PhaseName] = ["basin"] * len(levels)
    names[:first] = ["warm-up"] * first
    names[last + 1 :] = ["ascent"] * (len(levels) - 1 - last)
    return names


def _make_phases(
    series: np.ndarray, edges: np.ndarray, ends: Partition, names: list[PhaseName]
) -> list[Phase]:
    phases = []
    start = 0
    for name, end in zip(names, ends, strict=True):
        level = float(np.exp(series[start:end].mean()))
        phases.append(Phase(name=name, start=int(edges[start]), stop=int(edges[end]), level=level))
        start = end
    return phases


def _make_boundaries(
    edges: np.ndarray, ends: Partition, resampled: list[Partition]
) -> list[Boundary]:
    """The ends of all pieces but the last, with their quantiles over the resampled profiles."""
    tails = [(1 - COVERAGE) / 2, (1 + COVERAGE) / 2]
    lows, highs = np.quantile(resampled, tails, axis=0)
    boundaries = []
    for end, low, high in zip(ends[:-1], lows, highs, strict=False):
        # Quantiles may lie between two bins, so the interval is rounded outwards.
        low_step = int(edges[int(low)])
        high_step = int(edges[math.ceil(high)])
        boundaries.append(Boundary(step=int(edges[end]), low=low_step, high=high_step))
    return boundaries

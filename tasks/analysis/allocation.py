"""Put windows where influence is high: from the phases of a profile to the windows of a stage."""

from __future__ import annotations

from itertools import pairwise

from secateur.tasks.results.profile_results import Phases


def allocate_windows(phases: Phases, budget: float, steps: int) -> list[range]:
    """Return the windows of a stage of `steps` steps, at the steps of the largest influence.

    Warm-up and ascent consist of pieces, each with a level of influence. Pieces are taken from the
    highest level down, until the windows hold the share `budget` of the steps. A piece that does
    not fit is cut on its side towards the basin: a warm-up keeps its first steps, an ascent its
    last. The basin gets no window. If there are no phases, any steps are as good as others, and the
    stage's last ones are taken.
    """
    room = max(1, int(budget * steps))
    windows = []
    pieces = zip(phases.phases, _scaled_bounds(phases, steps), strict=True)
    for phase, bounds in sorted(pieces, key=lambda piece: -piece[0].level):
        length = min(len(bounds), room)
        if phase.name == "basin" or length <= 0:
            continue
        if phase.name == "warm-up":
            windows.append(range(bounds.start, bounds.start + length))
        else:
            windows.append(range(bounds.stop - length, bounds.stop))
        room -= length
    return _join_adjacent(windows) or [range(steps - room, steps)]


def describe_phases(phases: Phases) -> str:
    """Return a sentence with the reason for the suggested windows, or for having none."""
    if not phases.is_complete:
        return (
            f"recorded in {phases.recorded} of {phases.steps} steps: a profile of windows cannot "
            f"show a stage's phases; record a stage in full (no `windows`) to get a suggestion"
        )
    if not phases.phases:
        return "no phases found: the profile is flat, and any steps are as good as others"
    names = dict.fromkeys(phase.name for phase in phases.phases if phase.name != "basin")
    ratios = [f"{name} {phases.ratio_to_basin(name):.3g} times the basin" for name in names]
    return (
        f"{' and '.join(ratios)}; {phases.support:.0%} of resampled profiles show the same phases"
    )


def _scaled_bounds(phases: Phases, steps: int) -> list[range]:
    """The steps of each piece in a stage of `steps` steps. Each piece keeps at least one step."""
    last = len(phases.phases) - 1
    ends = [0]
    for number, phase in enumerate(phases.phases):
        stop = round(phase.stop * steps / phases.steps)
        # Room is left for one step of each later piece.
        ends.append(min(max(stop, ends[-1] + 1), steps - last + number))
    return [range(start, stop) for start, stop in pairwise(ends)]


def _join_adjacent(windows: list[range]) -> list[range]:
    joined: list[range] = []
    for window in sorted(windows, key=lambda steps: steps.start):
        if joined and joined[-1].stop == window.start:
            window = range(joined.pop().start, window.stop)
        joined.append(window)
    return joined

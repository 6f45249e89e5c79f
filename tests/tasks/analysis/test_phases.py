"""Phases of profiles with known change points, of flat profiles, and in any unit."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.tasks.analysis import phases as module
from secateur.tasks.analysis.phases import find_phases
from secateur.tasks.results.profile_results import Phases


def make_noise(seed: int, length: int = 200) -> np.ndarray:
    """A flat profile of level 1, with noise of 30%."""
    return np.exp(np.random.default_rng(seed).normal(0, 0.3, length))


def find(profile: np.ndarray) -> Phases:
    """The phases of a profile of every step."""
    return find_phases(range(len(profile)), profile.tolist(), len(profile))


def test_known_change_points_are_found_within_their_intervals() -> None:
    """An interval holds the true change point with 95%, so 2 of 20 may miss it."""
    hits = []
    for seed in range(10):
        profile = make_noise(seed)
        profile[:15] *= 20
        profile[140:] *= 3
        phases = find(profile)
        assert [phase.name for phase in phases.phases] == ["warm-up", "basin", "ascent"]
        assert phases.ratio_to_basin("warm-up") == pytest.approx(20, rel=0.3)
        assert phases.ratio_to_basin("ascent") == pytest.approx(3, rel=0.3)
        hits += [
            b.low <= truth <= b.high for b, truth in zip(phases.boundaries, (15, 140), strict=True)
        ]
        assert all(b.low <= b.step <= b.high and b.high - b.low < 30 for b in phases.boundaries)
    assert sum(hits) >= 18


def test_a_flat_profile_has_no_phases(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "RESAMPLES", 2)
    assert [seed for seed in range(40) if find(make_noise(seed)).phases] == []
    assert find(np.ones(50)).phases == []


def test_pieces_below_twice_the_basins_level_belong_to_it() -> None:
    steady = np.exp(np.random.default_rng(0).normal(0, 0.01, 90))
    for levels in ((1, 1.4, 1), (1, 1.9, 1.2), (1.8, 1, 1.8)):
        assert find(steady * np.repeat(levels, 30)).phases == []
    phases = find(steady * np.repeat((1, 1.8, 4), 30))
    assert [(p.name, p.start, p.stop) for p in phases.phases] == [
        ("basin", 0, 30), ("basin", 30, 60), ("ascent", 60, 90),
    ]  # fmt: skip
    assert phases.ratio_to_basin("ascent") == pytest.approx(4 / 1.8**0.5, rel=0.02)


def test_a_gradual_ascent_has_several_pieces_and_hides_no_warm_up() -> None:
    rise = np.concatenate([np.geomspace(10, 1, 10), np.ones(60), np.geomspace(1, 40, 130)])
    names = [phase.name for phase in find(make_noise(5) * rise).phases]
    assert list(dict.fromkeys(names)) == ["warm-up", "basin", "ascent"]
    assert names.count("ascent") > 1


@settings(max_examples=8, deadline=None)
@given(st.floats(1e-12, 1e12), st.integers(0, 50))
def test_phases_do_not_depend_on_the_unit(factor: float, seed: int) -> None:
    profile = make_noise(seed, 60) * np.repeat([5.0, 1.0, 3.0], 20)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "RESAMPLES", 20)
        one, other = find(profile), find(profile * factor)
    assert one.boundaries == other.boundaries
    for a, b in zip(one.phases, other.phases, strict=True):
        assert (a.name, a.start, a.stop) == (b.name, b.start, b.stop)
        assert b.level == pytest.approx(a.level * factor)


def test_the_lowest_piece_is_the_basin() -> None:
    names = {
        (9, 3, 1): "warm-up basin",
        (1, 3, 9): "basin ascent",
        (4, 1, 4): "warm-up basin ascent",
    }
    for levels, expected in names.items():
        phases = find(make_noise(3, 90) ** 0.1 * np.repeat(levels, 30))
        assert list(dict.fromkeys(p.name for p in phases.phases)) == expected.split()
        assert (phases.phases[0].start, phases.phases[-1].stop) == (0, 90)
        assert [b.step for b in phases.boundaries] == [p.start for p in phases.phases[1:]]


def test_steps_without_influence_are_left_out_of_long_profiles() -> None:
    profile = make_noise(1, 1000) * np.where(np.arange(1000) < 100, 10, 1)
    profile[[0, 500]] = 0, np.nan
    phases = find(profile)
    assert [(p.name, p.start, p.stop) for p in phases.phases] == [
        ("warm-up", 0, phases.phases[1].start),
        ("basin", phases.phases[1].start, 1000),
    ]
    assert phases.phases[0].stop == pytest.approx(100, abs=5)


def test_a_profile_of_windows_has_no_phases() -> None:
    phases = find_phases([*range(20), *range(80, 100)], [5.0] * 20 + [1.0] * 20, 100)
    assert (phases.is_complete, phases.recorded, phases.phases) == (False, 40, [])

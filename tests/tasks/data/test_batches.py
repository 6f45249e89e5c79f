"""Batch schedules: an epoch uses every sample once, only the seed decides, windows and rates."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from secateur.errors import PlanError
from secateur.tasks.data.batches import BatchSchedule
from secateur.tasks.data.seeds import seed_for
from tests.tasks.small import small_plan


def make_schedule(
    samples: int = 50, stage: dict[str, Any] | None = None, **changes: Any
) -> BatchSchedule:
    """The batch schedule of a plan with one stage."""
    stages = [stage or {"epochs": 2, "batch_size": 8}]
    return BatchSchedule(small_plan(Path("/"), stages=stages, **changes), 0, samples)


@given(st.integers(1, 60), st.integers(1, 70), st.integers(1, 3), st.integers(0, 5))
def test_an_epoch_uses_every_sample_once(samples: int, batch: int, epochs: int, seed: int) -> None:
    schedule = make_schedule(samples, {"epochs": epochs, "batch_size": batch}, seed=seed)
    rows = torch.cat([schedule.batch(step) for step in range(schedule.steps)])
    assert rows.view(epochs, samples).sort(1).values.tolist() == [list(range(samples))] * epochs


def test_a_batch_does_not_depend_on_which_steps_were_read_before() -> None:
    forward = make_schedule()
    backward = make_schedule()
    steps = list(range(forward.steps))
    assert [forward.batch(s).tolist() for s in steps] == [
        backward.batch(s).tolist() for s in steps[::-1]
    ][::-1]


def test_seeds_of_stages_epochs_and_steps_differ() -> None:
    schedule = make_schedule()
    assert len({schedule.seed(step) for step in range(1000)}) == 1000
    assert seed_for(0, "order", 1, 2) != seed_for(0, "order", 12)
    assert make_schedule(seed=1).batch(0).tolist() != schedule.batch(0).tolist()


@pytest.mark.parametrize(
    ("windows", "expected"),
    [
        ([{"start": 0.0, "stop": 0.5}], [range(0, 10)]),
        ([{"start": 3, "stop": 5, "unit": "steps"}], [range(3, 5)]),
        ([{"start": 15, "stop": 20, "unit": "steps"}, {"stop": 0.1}], [range(15, 20), range(0, 2)]),
    ],
)
def test_windows_are_given_in_fractions_or_steps(
    windows: list[dict[str, Any]], expected: list[range]
) -> None:
    schedule = make_schedule(stage={"steps": 20, "batch_size": 8, "windows": windows})
    assert schedule.windows() == expected


@pytest.mark.parametrize(
    ("windows", "sentence"),
    [
        (
            [{"start": 3, "stop": 21, "unit": "steps"}],
            "window 3 to 21 steps of stage 0 is not within its 20 steps",
        ),
        ([{"start": 0.0, "stop": 0.01}], r"window 0 to 0\.01 fraction of stage 0 is not within"),
        ([{"stop": 0.5}, {"start": 0.4, "stop": 1.0}], "overlap at step 8"),
    ],
)
def test_impossible_windows_are_refused(windows: list[dict[str, Any]], sentence: str) -> None:
    schedule = make_schedule(stage={"steps": 20, "batch_size": 8, "windows": windows})
    with pytest.raises(PlanError, match=sentence):
        schedule.windows()


def test_a_cosine_begins_with_its_warm_up() -> None:
    schedule = make_schedule(
        stage={"steps": 20, "batch_size": 8},
        schedule={"kind": "cosine", "warmup": 0.2, "final": 0.1},
        optimizer={"kind": "sgd", "lr": 2},
    )
    rates = [schedule.rate_factor(step) for step in range(20)]
    assert rates[:5] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])
    assert rates[12] == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi * 8 / 16)) / 2)
    assert min(rates[4:]) > 0.1


def test_a_schedule_over_the_run_continues_in_the_next_stage() -> None:
    stages = [{"steps": 10, "batch_size": 8}, {"steps": 10, "batch_size": 8}]
    plan = small_plan(
        Path("/"),
        stages=stages,
        schedule={"kind": "cosine", "over": "run"},
        optimizer={"kind": "sgd", "lr": 1.0},
    )
    schedules = [BatchSchedule(plan, stage, 50) for stage in range(2)]
    both = [schedule.rate_factor(step) for schedule in schedules for step in range(10)]
    single = make_schedule(
        stage={"steps": 20, "batch_size": 8},
        schedule={"kind": "cosine"},
        optimizer={"kind": "sgd", "lr": 1.0},
    )
    assert both == pytest.approx([single.rate_factor(step) for step in range(20)])

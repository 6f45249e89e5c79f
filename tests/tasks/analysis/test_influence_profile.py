"""Influence profiles, compared with training again with slightly changed sample weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch

from secateur.storage.frames import read_frame
from secateur.tasks.analysis.influence_profile import write_profile
from secateur.tasks.analysis.profile_frames import learning_rates, profile_series
from secateur.tasks.data.batches import BatchSchedule
from secateur.tasks.data.samples import list_target_samples, read_stage_samples
from secateur.tasks.plan import Plan
from secateur.tasks.results.profile_results import EVOLUTION, EVOLUTION_PLOT, PROFILE, PROFILE_PLOT
from secateur.tasks.results.valuation_results import read_scores, read_scoring_gradients
from secateur.tasks.run import Run
from secateur.tasks.training.loop import MicroBatch, TrainingLoop
from secateur.tasks.training.segments import restore_segment_start
from secateur.tasks.valuation.target_gradients import target_loss
from tests.tasks.small import curate_small, make_data, small_plan

EPS = 1e-3
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "sgd": {"kind": "sgd", "lr": 0.2, "momentum": 0.5, "weight_decay": 0.01, "at_stage": "carry"},
    "adamw": {"kind": "adamw", "lr": 0.01, "at_stage": "carry"},
    "reset": {"kind": "adamw", "lr": 0.01},
}


def tiny(folder: Path, name: str, **changes: Any) -> Plan:
    """Three stages of a network of 162 parameters, with all coefficients and exact Hessians."""
    exact: dict[str, Any] = {
        "run": name,
        "dtype": "float64",
        "model": {"factory": "tests.tasks.digits:network", "args": {"width": 2, "dropout": 0.0}},
        "optimizer": OPTIMIZERS[name.split("-")[0]],
        "schedule": {"kind": "cosine", "warmup": 0.3, "over": "run"},
        "stages": [{"steps": steps, "batch_size": 8} for steps in (4, 3, 3)],
        "segment_steps": 2,
        "basis": {"kind": "coordinates", "numbers": None, "fit_steps": 1},
        "curvature": {"kind": "hessian", "every": 1, "coupling": "full"},
    }
    return small_plan(folder, **exact | changes)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("profile")
    make_data(folder)
    return folder


class ReweightedLoop(TrainingLoop):
    """A loop that changes sample weights in one step.

    Attributes:
        changed: the step, the sample's place in its batch (None for all), and the factor.
    """

    changed: tuple[int, int | None, float] = (-1, None, 1.0)

    def micro_batches(self, step: int) -> list[MicroBatch]:
        (part,) = super().micro_batches(step)
        if step == self.changed[0]:
            factors = torch.ones_like(part.weights)
            factors[slice(None) if self.changed[1] is None else self.changed[1]] = self.changed[2]
            part = MicroBatch(part.rows, part.tensors, part.weights * factors)
        return [part]


def loss_at(run: Run, view: int, stage: int, changed: tuple[int, int | None, float]) -> float:
    """The target's loss at the end of stage `view`, after training from the start of `stage`."""
    loop = ReweightedLoop(run, stage, read_stage_samples(run, stage))
    restore_segment_start(run, loop, stage, 0)
    for number in range(stage, view + 1):
        if number > stage:
            state, loop = (
                loop.capture_state(),
                ReweightedLoop(run, number, read_stage_samples(run, number)),
            )
            loop.load_state(state, optimizer=run.plan.optimizer.at_stage == "carry")
        loop.changed = changed if number == stage else (-1, None, 1.0)
        for step in range(loop.schedule.steps):
            loop.step(step)
    target = list_target_samples(run, "clean")
    return target_loss(loop, target, torch.arange(len(target)))


def effect(run: Run, view: int, stage: int, step: int, place: int | None = None) -> float:
    """How much leaving samples out raises the loss, to first order."""
    less, more = (loss_at(run, view, stage, (step, place, 1 + sign * EPS)) for sign in (-1, 1))
    return (less - more) / (2 * EPS)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_profiles_equal_training_again_from_every_later_stage(folder: Path, name: str) -> None:
    run = curate_small(tiny(folder, name))
    write_profile(run, 2)
    for view, stage, step in ((0, 0, 1), (2, 0, 0), (2, 0, 3), (2, 1, 1), (2, 2, 2)):
        frame = read_frame(run.folder.stage(view).profile, PROFILE)
        row = frame.filter(stage=stage, step=step, quantity="score").row(0, named=True)
        assert row["count"] == 8
        assert row["mean"] * 8 == pytest.approx(effect(run, view, stage, step), rel=1e-3, abs=1e-9)
    each = np.array([effect(run, 2, 0, 1, place) for place in range(8)])
    row = (
        read_frame(run.folder.stage(2).profile, PROFILE)
        .filter(stage=0, step=1, quantity="score")
        .row(0, named=True)
    )
    assert row["mean_abs"] == pytest.approx(np.abs(each).mean(), rel=1e-3)
    assert row["std"] == pytest.approx(each.std(ddof=1), rel=1e-3)
    assert [row["q05"], row["q50"], row["q75"]] == pytest.approx(
        np.quantile(each, [0.05, 0.5, 0.75]).tolist(), rel=1e-2
    )


def test_quantities_and_evolution_follow_from_the_scores(folder: Path) -> None:
    mean = {"horizon": "stage", "aggregate": "mean", "estimate": "embedding"}
    run = curate_small(tiny(folder, "sgd-mean", score=mean, curvature={"kind": "empirical_fisher"}))
    plot = write_profile(run, 1)
    frame = read_frame(run.folder.stage(1).profile, PROFILE)
    length = float(read_scoring_gradients(run, 1, "clean").mean(0).norm())
    known = read_scores(run, 1).filter(step=2)
    schedule = BatchSchedule(run.plan, 1, len(read_stage_samples(run, 1)))
    assert learning_rates(run, 1)["rate"].to_list() == pytest.approx(
        [0.2 * schedule.rate_factor(step) for step in range(3)]
    )
    scores = known["score_clean"].to_numpy()
    per_rate = scores / (0.2 * schedule.rate_factor(2))
    expected = {
        "score": scores,
        "per_rate": per_rate,
        "relative": per_rate / (known["norm"].to_numpy() * length),
    }
    for quantity, values in expected.items():
        row = frame.filter(stage=1, step=2, quantity=quantity).row(0, named=True)
        assert (row["mean"], row["mean_abs"]) == pytest.approx(
            (values.mean(), np.abs(values).mean()), rel=1e-9
        )
    # At a stage's last step it is a cosine, except for weight decay.
    assert np.abs(expected["relative"]).max() <= 1 + 1e-6
    evolution = read_frame(run.folder.stage(1).profile, EVOLUTION)
    assert evolution.select("stage", "view").rows() == [(0, 0), (0, 1), (1, 1)]
    rows = frame.filter(stage=0, quantity="per_rate")
    assert evolution.filter(stage=0, view=1)["mean_abs"].item() == pytest.approx(
        rows["mean_abs"].mean()
    )
    assert run.folder.stage(1).profile.url(PROFILE_PLOT) == plot
    for name in (PROFILE_PLOT, EVOLUTION_PLOT):
        assert run.folder.stage(1).profile.read(name).startswith(b"\x89PNG")


def test_replay_is_added_to_the_profile(folder: Path) -> None:
    one = curate_small(tiny(folder, "adamw-whole"))
    other = curate_small(
        tiny(folder, "adamw-replay", score={"horizon": "stage", "aggregate": "mean"})
    )
    frames = []
    for run in (one, other):
        write_profile(run, 1)
        frames.append(read_frame(run.folder.stage(1).profile, PROFILE))
    embedded = frames[1].filter(estimate="embedding")
    columns = ["stage", "step", "quantity", "mean", "mean_abs", "q95"]
    for a, b in zip(frames[0].select(columns).rows(), embedded.select(columns).rows(), strict=True):
        assert a[:3] == b[:3]
        assert a[3:] == pytest.approx(b[3:], rel=1e-6, abs=1e-12)
    replayed = frames[1].filter(estimate="replay", quantity="score")
    means = (
        read_scores(other, 1)
        .group_by("step")
        .agg(pl.col("score_clean").mean())
        .sort("step")["score_clean"]
    )
    assert replayed["stage"].unique().to_list() == [1]
    assert replayed["mean"].to_list() == pytest.approx(means.to_list())
    steps, values = profile_series(frames[1], 1, "clean")
    assert steps == [0, 1, 2]
    assert (
        values
        == frames[1].filter(stage=1, estimate="replay", quantity="per_rate")["mean_abs"].to_list()
    )

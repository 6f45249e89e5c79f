"""Replay of whole stages: against audits' true retraining, resumable, the same frame as other scores."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch

from secateur.errors import PlanError
from secateur.influence.adjoint import step_back
from secateur.tasks.data.samples import list_target_samples, read_stage_samples
from secateur.tasks.run.run import Run
from secateur.tasks.training.loop import TrainingLoop, eval_mode
from secateur.tasks.training.train import restore_segment_start
from secateur.tasks.valuation.embed import segment_of
from secateur.tasks.valuation.replay import replay_stage
from secateur.tasks.valuation.score import read_scores
from tests.tasks.small import curate_small, make_data, small_plan

REPLAYED = {"estimate": "replay", "horizon": "stage", "aggregate": "mean"}
ADAMW = {
    "kind": "adamw",
    "lr": 0.01,
    "weight_decay": 0.1,
    "groups": [{"parameters": ["*.bias"], "weight_decay": 0.0, "lr": 0.02}],
}
CLIPPED = {"kind": "sgd", "lr": 0.2, "momentum": 0.5, "clip_norm": 0.5}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("replay")
    make_data(made)
    return made


def replayed(folder: Path, name: str, **changes: Any) -> Run:
    settings = {
        "replay": {"step": 1e-5},
        "dtype": "float64",
        "score": REPLAYED,
        "basis": {"kind": "coordinates", "numbers": 100},
        **changes,
    }
    return curate_small(small_plan(folder, run=name, **settings))


def loss_without(run: Run, step: int, row: int, weight: float) -> float:
    """The target's loss at the stage's end, where one use of a sample weighs `1 - weight` of what it did."""
    loop = TrainingLoop(run, 0, read_stage_samples(run, 0))
    restore_segment_start(run, loop, 0, 0)
    whole = loop.micro_batches

    def lighter(asked: int) -> list[Any]:
        parts = whole(asked)
        if asked != step:
            return parts
        return [
            type(p)(
                p.rows, p.tensors, torch.where(p.rows == row, (1 - weight) * p.weights, p.weights)
            )
            for p in parts
        ]

    loop.micro_batches = lighter  # type: ignore[method-assign]
    for number in range(loop.order.steps):
        loop.step(number)
    with eval_mode(loop.model), torch.no_grad():
        samples = list_target_samples(run, "clean")
        return float(
            loop.task.losses(loop.model, loop.batch(torch.arange(len(samples)), samples)).mean()
        )


@pytest.mark.parametrize(
    "optimizer", [ADAMW, {"kind": "rmsprop", "lr": 0.01}, {"kind": "adam", "lr": 0.01}]
)
def test_scores_are_derivatives_of_the_run_itself(folder: Path, optimizer: dict[str, Any]) -> None:
    """With dropout, a schedule, micro-batches and parameter groups, over all segments."""
    stages = [{"steps": 14, "batch_size": 20, "accumulate": 2}]
    schedule = {"kind": "cosine", "warmup": 0.2}
    run = replayed(
        folder, f"truth-{optimizer['kind']}", optimizer=optimizer, stages=stages, schedule=schedule
    )
    scores = read_scores(run, 0)
    for use in (0, 90, 150, 279):
        step, row = int(scores["step"][use]), int(scores["sample"][use])
        up, down = (loss_without(run, step, row, sign * 1e-4) for sign in (1, -1))
        assert scores["score_clean"][use] == pytest.approx((up - down) / 2e-4, rel=1e-3, abs=1e-9)


def test_it_is_the_frame_of_the_other_scores(folder: Path) -> None:
    run = replayed(folder, "frame", optimizer=CLIPPED)
    other = curate_small(small_plan(folder, run="frame-e", dtype="float64", optimizer=CLIPPED))
    names = ["sample", "key", "step", "window", "loss"]
    assert read_scores(run, 0).select(names).equals(read_scores(other, 0).select(names))


def test_an_interrupted_replay_carries_on_to_the_same_scores(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = read_scores(replayed(folder, "whole", optimizer=ADAMW), 0)
    taken = 0

    def interrupted(*arguments: Any) -> Any:
        nonlocal taken
        taken += 1
        if taken == 9:
            raise KeyboardInterrupt
        return step_back(*arguments)

    monkeypatch.setattr("secateur.tasks.valuation.replay.step_back", interrupted)
    with pytest.raises(KeyboardInterrupt):
        replayed(folder, "resumed", optimizer=ADAMW)
    resumed = replayed(folder, "resumed", optimizer=ADAMW)
    assert read_scores(resumed, 0).equals(whole)
    assert taken == 9 + 21 - 3 + 10  # the first walk had committed the last segment, of three steps


def test_several_targets_in_one_walk(folder: Path) -> None:
    target = {"shards": f"{folder}/target-0.tar"}
    other = {"shards": f"{folder}/train-1.tar"}
    both = replayed(folder, "both", optimizer=ADAMW, targets={"clean": target, "train": other})
    one = replayed(folder, "one", optimizer=ADAMW, targets={"clean": target})
    assert read_scores(both, 0)["score_clean"].equals(read_scores(one, 0)["score_clean"])
    assert (
        read_scores(both, 0)["score_train"].to_list()
        != read_scores(one, 0)["score_clean"].to_list()
    )


def test_forward_mode_agrees_with_differences(folder: Path) -> None:
    central = read_scores(replayed(folder, "central", optimizer=ADAMW), 0)["score_clean"]
    exact = read_scores(replayed(folder, "jvp", optimizer=ADAMW, replay={"method": "jvp"}), 0)[
        "score_clean"
    ]
    assert central.to_list() == pytest.approx(exact.to_list(), rel=1e-4, abs=1e-9)


def test_training_that_does_not_repeat_itself_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = curate_small(small_plan(folder, run="unlike", optimizer=CLIPPED))
    monkeypatch.setattr(
        TrainingLoop,
        "batch",
        lambda loop, rows, samples=None: {"x": torch.randn(len(rows), 64), "y": rows % 10.0},
    )
    with pytest.raises(PlanError, match="does not repeat itself"):
        replay_stage.fn(run.url, 0)


@pytest.mark.parametrize(
    "score", [{"estimate": "replay"}, {"estimate": "replay", "horizon": "stage"}]
)
def test_replay_of_what_it_does_not_answer_is_refused(folder: Path, score: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="effects on a target's mean loss at the stage's end"):
        small_plan(folder, score=score)


def test_adamw_embeddings_with_the_hessian_agree_with_replay(folder: Path) -> None:
    """All coordinates, the Hessian of each step's own batch: nothing is approximated but the labels' rounding."""
    stages = [{"steps": 14, "batch_size": 20}]
    common: dict[str, Any] = {
        "dtype": "float64", "optimizer": ADAMW, "stages": stages, "basis": {"kind": "coordinates", "numbers": None},
        "curvature": {"kind": "hessian", "coupling": "full", "every": 1},
        "model": {"factory": "tests.tasks.small:network", "args": {"width": 4}}, "replay": {"step": 1e-5},
    }  # fmt: skip
    embedded = curate_small(
        small_plan(folder, run="he", score=REPLAYED | {"estimate": "embedding"}, **common)
    )
    exact = curate_small(small_plan(folder, run="hr", score=REPLAYED, **common))
    found = read_scores(embedded, 0)["score_clean"].to_numpy()
    expected = read_scores(exact, 0)["score_clean"].to_numpy()
    assert found == pytest.approx(expected, rel=1e-3, abs=1e-7)


def test_sampled_labels_are_recorded_beside_the_contributions(folder: Path) -> None:
    run = curate_small(small_plan(folder, run="fisher", curvature={"kind": "fisher"}))
    for ledger in run.folder.stage(0).segments():
        segment = segment_of(ledger)
        assert segment.fisher_steps.tolist() == segment.steps.tolist()
        assert segment.fisher_weights.tolist() == pytest.approx(segment.weights.tolist())
        assert not torch.equal(segment.fisher, segment.contributions)
    assert len(read_scores(run, 0).filter(pl.col("score_clean").is_nan())) == 0


def test_a_task_that_cannot_draw_labels_is_named(folder: Path) -> None:
    plan = small_plan(
        folder, run="nf", curvature={"kind": "fisher"}, task={"factory": "tests.tasks.small:Plain"}
    )
    with pytest.raises(
        PlanError, match=r"needs a method sampled\(model, batch\) on tests.tasks.small:Plain"
    ):
        curate_small(plan)

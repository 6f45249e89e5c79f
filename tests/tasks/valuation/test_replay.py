"""Replay of whole stages, compared with retraining, with forward mode and with embeddings."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch

from secateur.errors import PlanError
from secateur.influence.tape import StepState
from secateur.tasks.data.samples import list_target_samples, read_stage_samples
from secateur.tasks.results.valuation_results import read_replay_scores, read_scores
from secateur.tasks.run import Run
from secateur.tasks.training.loop import MicroBatch, TrainingLoop, eval_mode
from secateur.tasks.training.segments import restore_segment_start
from secateur.tasks.valuation import replay
from secateur.tasks.valuation.dynamics import read_segment
from secateur.tasks.valuation.query import find_influential
from secateur.tasks.valuation.replay import replay_stage
from secateur.tasks.valuation.stored_steps import StoredSteps
from tests.tasks.small import curate_small, interrupt_replay, make_data, small_plan

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
    folder = tmp_path_factory.mktemp("replay")
    make_data(folder)
    return folder


def curate_by_replay(folder: Path, name: str, **changes: Any) -> Run:
    """Run a plan in float64 that scores by replay."""
    settings = {
        "replay": {"step": 1e-5},
        "dtype": "float64",
        "score": REPLAYED,
        "basis": {"kind": "coordinates", "numbers": 100},
        **changes,
    }
    return curate_small(small_plan(folder, run=name, **settings))


def loss_without(run: Run, step: int, row: int, weight: float) -> float:
    """Train again with `1 - weight` of the weight of one use, and return the target's loss."""
    loop = TrainingLoop(run, 0, read_stage_samples(run, 0))
    restore_segment_start(run, loop, 0, 0)
    micro_batches = loop.micro_batches

    def reduce_weight(number: int) -> list[MicroBatch]:
        parts = micro_batches(number)
        if number != step:
            return parts
        return [
            replace(p, weights=torch.where(p.rows == row, (1 - weight) * p.weights, p.weights))
            for p in parts
        ]

    loop.micro_batches = reduce_weight  # type: ignore[method-assign, assignment]
    for number in range(loop.schedule.steps):
        loop.step(number)
    with eval_mode(loop.model), torch.no_grad():
        samples = list_target_samples(run, "clean")
        return float(
            loop.task.losses(loop.model, loop.batch(torch.arange(len(samples)), samples)).mean()
        )


@pytest.mark.parametrize(
    "optimizer", [ADAMW, {"kind": "rmsprop", "lr": 0.01}, {"kind": "adam", "lr": 0.01}]
)
def test_scores_are_derivatives_of_training(folder: Path, optimizer: dict[str, Any]) -> None:
    """With dropout, a schedule, micro-batches and parameter groups, over all segments."""
    stages = [{"steps": 14, "batch_size": 20, "accumulate": 2}]
    schedule = {"kind": "cosine", "warmup": 0.2}
    run = curate_by_replay(
        folder, f"truth-{optimizer['kind']}", optimizer=optimizer, stages=stages, schedule=schedule
    )
    scores = read_scores(run, 0)
    for use in (0, 90, 150, 279):
        step, row = int(scores["step"][use]), int(scores["sample"][use])
        up, down = (loss_without(run, step, row, sign * 1e-4) for sign in (1, -1))
        assert scores["score_clean"][use] == pytest.approx((up - down) / 2e-4, rel=1e-3, abs=1e-9)


def test_replay_scores_the_same_uses_as_embeddings(folder: Path) -> None:
    run = curate_by_replay(folder, "frame", optimizer=CLIPPED)
    other = curate_small(small_plan(folder, run="frame-e", dtype="float64", optimizer=CLIPPED))
    names = ["sample", "key", "step", "window", "loss"]
    assert read_scores(run, 0).select(names).equals(read_scores(other, 0).select(names))


def test_an_interrupted_replay_continues_to_the_same_scores(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = read_scores(curate_by_replay(folder, "whole", optimizer=ADAMW), 0)
    steps = interrupt_replay(monkeypatch, at=9)
    with pytest.raises(KeyboardInterrupt):
        curate_by_replay(folder, "resumed", optimizer=ADAMW)
    resumed = curate_by_replay(folder, "resumed", optimizer=ADAMW)
    assert read_scores(resumed, 0).equals(whole)
    # The first walk had committed the last segment, of 3 steps.
    assert len(steps) == 9 + 21 - 3 + 10


def test_several_targets_of_one_walk_score_like_single_ones(folder: Path) -> None:
    target = {"shards": f"{folder}/target-0.tar"}
    other = {"shards": f"{folder}/train-1.tar"}
    both = curate_by_replay(
        folder, "both", optimizer=ADAMW, targets={"clean": target, "train": other}
    )
    one = curate_by_replay(folder, "one", optimizer=ADAMW, targets={"clean": target})
    assert read_scores(both, 0)["score_clean"].equals(read_scores(one, 0)["score_clean"])
    assert (
        read_scores(both, 0)["score_train"].to_list()
        != read_scores(one, 0)["score_clean"].to_list()
    )


def test_forward_mode_agrees_with_central_differences(folder: Path) -> None:
    central = read_scores(curate_by_replay(folder, "central", optimizer=ADAMW), 0)["score_clean"]
    exact = read_scores(
        curate_by_replay(folder, "jvp", optimizer=ADAMW, replay={"method": "jvp"}), 0
    )["score_clean"]
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
        replay_stage(run, 0)


@pytest.mark.parametrize(
    "score", [{"estimate": "replay"}, {"estimate": "replay", "horizon": "stage"}]
)
def test_replay_of_scores_that_are_not_effects_is_refused(
    folder: Path, score: dict[str, Any]
) -> None:
    with pytest.raises(ValueError, match="effects on a target's mean loss at the stage's end"):
        small_plan(folder, score=score)


@pytest.mark.parametrize(
    ("kind", "model"),
    [
        ("hessian", {"factory": "tests.tasks.digits:network", "args": {"width": 4}}),
        ("gauss_newton", {"factory": "tests.tasks.digits:linear"}),
    ],
)
def test_adamw_embeddings_with_an_exact_curvature_agree_with_replay(
    folder: Path, kind: str, model: dict[str, Any]
) -> None:
    """With all coordinates and each step's exact Hessian, only rounding differs.

    That of a linear model is its Gauss-Newton matrix.
    """
    stages = [{"steps": 14, "batch_size": 20}]
    common: dict[str, Any] = {
        "dtype": "float64",
        "optimizer": ADAMW,
        "stages": stages,
        "basis": {"kind": "coordinates", "numbers": None},
        "curvature": {"kind": kind, "coupling": "full", "every": 1},
        "model": model,
        "replay": {"step": 1e-5},
    }
    embedded = curate_small(
        small_plan(
            folder, run=f"{kind}-embedded", score=REPLAYED | {"estimate": "embedding"}, **common
        )
    )
    exact = curate_small(small_plan(folder, run=f"{kind}-replayed", score=REPLAYED, **common))
    found = read_scores(embedded, 0)["score_clean"].to_numpy()
    expected = read_scores(exact, 0)["score_clean"].to_numpy()
    assert found == pytest.approx(expected, rel=1e-3, abs=1e-7)


@pytest.mark.parametrize("at_stage", ["reset", "carry"])
def test_questions_pulled_back_and_replayed_agree(folder: Path, at_stage: str) -> None:
    """Over two stages, with all coordinates and each step's exact Hessian."""
    stages = [{"steps": 7, "batch_size": 20}, {"steps": 6, "batch_size": 20}]
    plan = small_plan(
        folder,
        run=f"asked-{at_stage}",
        dtype="float64",
        optimizer=ADAMW | {"at_stage": at_stage},
        stages=stages,
        segment_steps=4,
        basis={"kind": "coordinates", "numbers": None},
        curvature={"kind": "hessian", "coupling": "full", "every": 1},
        model={"factory": "tests.tasks.digits:network", "args": {"width": 4}},
        replay={"step": 1e-5},
        score={"estimate": "embedding"},
    )
    run = curate_small(plan)
    questions: list[dict[str, Any]] = [{"sample": "digit-0203"}, {"target": "clean"}]
    for question in questions:
        found = [
            {(hit.key, hit.stage, hit.step): hit.score for hit in hits}
            for hits in (
                find_influential(run, top=1000, estimate=estimate, **question).hits
                for estimate in ("embedding", "pull_back", "replay")
            )
        ]
        for other in found[:2]:
            assert other.keys() == found[2].keys()
            assert {hit[1] for hit in other} == {0, 1}
            assert other == pytest.approx(found[2], rel=1e-3, abs=1e-7)


def test_a_replayed_question_about_a_target_has_the_stored_scores(folder: Path) -> None:
    run = curate_by_replay(folder, "asked", optimizer=CLIPPED)
    hits = find_influential(run, target="clean", top=1000, stage=1, estimate="replay").hits
    stored = read_scores(run, 1).select("key", "step", "score_clean")
    expected = {(key, step): score for key, step, score in stored.iter_rows()}
    assert len(hits) == stored["key"].n_unique()
    for hit in hits:
        assert hit.score == pytest.approx(expected[hit.key, hit.step], rel=1e-6, abs=1e-12)


def test_gradients_of_sampled_labels_are_recorded_too(folder: Path) -> None:
    run = curate_small(small_plan(folder, run="fisher", curvature={"kind": "fisher"}))
    for ledger in run.folder.stage(0).segments():
        segment = read_segment(ledger)
        assert segment.fisher_steps.tolist() == segment.steps.tolist()
        # Samples count for as many positions as the task says, and the loss is a mean over them.
        loop = TrainingLoop(run, 0, read_stage_samples(run, 0))
        labels = loop.batch(segment.samples)["y"]
        expected = segment.weights / (1 + labels)
        assert segment.fisher_weights.tolist() == pytest.approx(expected.tolist())
        assert not torch.equal(segment.fisher, segment.contributions)
    assert len(read_scores(run, 0).filter(pl.col("score_clean").is_nan())) == 0


def test_a_task_that_cannot_sample_labels_is_named(folder: Path) -> None:
    plan = small_plan(
        folder, run="nf", curvature={"kind": "fisher"}, task={"factory": "tests.tasks.digits:Plain"}
    )
    with pytest.raises(
        PlanError, match=r"needs a method sampled\(model, batch\) on tests.tasks.digits:Plain"
    ):
        curate_small(plan)


def test_steps_on_disk_give_the_scores_of_steps_in_memory(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for name, stored in (("disk", StoredSteps), ("memory", InMemory)):
        monkeypatch.setattr(replay, "StoredSteps", stored)
        stages = [{"steps": 12, "batch_size": 20}]
        run = curate_by_replay(folder, name, optimizer=ADAMW, dtype="float32", stages=stages)
        found.append([read_replay_scores(run, 0, number)["clean"] for number in range(2)])
    for on_disk, in_memory in zip(*found, strict=True):
        assert torch.equal(on_disk, in_memory)


class InMemory(list[StepState]):
    """A plain list in the place of `StoredSteps`."""

    def __init__(self, *_: object) -> None:
        super().__init__()

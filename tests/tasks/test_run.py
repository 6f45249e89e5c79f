"""Whole runs on real digits: repeatable, resumable, and equal to independent computations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
import webdataset

from examples.shards import write_shards
from secateur.influence.recursion import walk_segment
from secateur.storage.frames import read_frame
from secateur.storage.layout import PLAN_PRUNING
from secateur.storage.ledger import read_checkpoint
from secateur.tasks.data.held_out import held_out_rows
from secateur.tasks.data.samples import list_target_samples, read_stage_samples
from secateur.tasks.pruning.prune import write_pruned_stage
from secateur.tasks.results.pruning_results import read_decisions
from secateur.tasks.results.valuation_results import (
    coupled_spans,
    read_scores,
    read_target_gradients,
)
from secateur.tasks.run import Run
from secateur.tasks.training import train
from secateur.tasks.training.loop import TrainingLoop
from secateur.tasks.valuation.dynamics import plan_dynamics, read_segment
from secateur.tasks.valuation.query import find_influential
from tests.tasks.small import curate_small, make_data, sample, small_plan

ALL = {"kind": "coordinates", "numbers": None, "fit_steps": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("digits")
    make_data(folder)
    return folder


@pytest.fixture(scope="module")
def run(folder: Path) -> Run:
    return curate_small(small_plan(folder))


def hash_files(run: Run) -> dict[str, str]:
    """The hash of every file of a run except its plan, by its name without the attempt."""
    hashes = {}
    for stage in (run.folder.stage(0), run.folder.stage(1)):
        outputs = [
            stage.samples,
            stage.embeddings,
            stage.index,
            stage.targets,
            stage.scores,
            *stage.segments(),
        ]
        if stage.prune(PLAN_PRUNING).committed:
            outputs.append(stage.prune(PLAN_PRUNING))
        for output in outputs:
            for name, facts in output.manifest.files.items():
                hashes[f"{output.root.url.removeprefix(run.url)}/{name}"] = facts["sha256"]
    return hashes


def differing(one: Run, other: Run) -> list[str]:
    """The names of files that differ between two runs of one plan.

    Samples and scores of the second stage hold the paths of its shards, which lie in the run's own
    folder. Of these two, only the scores are compared, without the paths.
    """
    a = hash_files(one)
    b = hash_files(other)
    assert a.keys() == b.keys()
    assert read_scores(one, 1).drop("shard").equals(read_scores(other, 1).drop("shard"))
    paths = ("/stages/01/samples", "/stages/01/scores")
    return [name for name in a if a[name] != b[name] and not name.startswith(paths)]


def test_the_next_stage_trains_on_what_was_kept(run: Run) -> None:
    decisions = read_decisions(run, 0)
    kept = decisions.filter("keep")["key"].to_list()
    assert read_stage_samples(run, 1).frame["key"].to_list() == kept
    read = [
        s["__key__"]
        for s in webdataset.WebDataset(read_stage_samples(run, 1).urls, shardshuffle=False)
    ]
    assert read == kept
    used = decisions.filter(pl.col("uses") > 0)
    assert len(kept) == len(decisions) - len(used) + round(len(used) / 2)
    dropped = run.folder.stage(0).prune(PLAN_PRUNING).read("dropped.txt").decode().splitlines()
    assert [line.split("\t") for line in dropped] == [
        list(row) for row in decisions.filter(~pl.col("keep")).select("key", "reason").iter_rows()
    ]


def test_a_stage_reads_its_shards_after_they_were_removed_and_pruned_again(folder: Path) -> None:
    """The second pruning writes the same samples, in another folder."""
    run = curate_small(small_plan(folder, run="again"))
    before = read_stage_samples(run, 1)
    run.folder.stage(0).prune(PLAN_PRUNING).remove()
    write_pruned_stage(run, 0)
    after = read_stage_samples(run, 1)
    assert set(before.urls).isdisjoint(after.urls)
    rows = range(len(after))
    assert [sample["__key__"] for sample in after.read(rows)] == before.frame["key"].to_list()


def test_only_samples_used_in_a_window_are_scored(run: Run) -> None:
    steps = (
        read_scores(run, 0).group_by("window").agg(pl.col("step").unique().sort()).sort("window")
    )
    assert [s.to_list() for s in steps["step"]] == [list(range(5)), list(range(16, 21))]
    strides = torch.cat([read_segment(s).strides for s in run.folder.stage(0).segments()]).tolist()
    between = [2.0 if step % 2 == 0 else 0.0 for step in range(5, 16)]
    assert strides == [1.0] * 5 + between + [1.0] * 5
    outside = read_decisions(run, 0).filter(pl.col("uses") == 0)
    assert outside["keep"].all()
    assert set(outside["reason"]) <= {"kept: not used in a window"}


def test_the_same_seed_gives_the_same_bytes(run: Run, folder: Path) -> None:
    again = curate_small(small_plan(folder, root=f"{folder}/again"))
    assert differing(run, again) == []


def test_another_seed_gives_another_order(run: Run, folder: Path) -> None:
    other = curate_small(small_plan(folder, root=f"{folder}/other", seed=1))
    assert read_decisions(run, 0)["keep"].to_list() != read_decisions(other, 0)["keep"].to_list()


@pytest.mark.parametrize("step", [0, 8, 20])
def test_an_interrupted_run_continues_to_the_same_bytes(
    run: Run, folder: Path, step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = small_plan(folder, root=f"{folder}/resumed{step}")
    take_step = TrainingLoop.step
    record_step = train._train_step
    steps: list[int] = []

    def interrupt(*args: Any) -> None:
        if args[-1] == step:
            raise KeyboardInterrupt
        record_step(*args)

    def count(loop: TrainingLoop, number: int, recording: object = None) -> object:
        steps.append(number)
        return take_step(loop, number, recording)  # type: ignore[arg-type]

    monkeypatch.setattr(train, "_train_step", interrupt)
    with pytest.raises(KeyboardInterrupt):
        curate_small(plan)
    monkeypatch.setattr(train, "_train_step", record_step)
    monkeypatch.setattr(TrainingLoop, "step", count)
    resumed = curate_small(plan)
    assert differing(run, resumed) == []
    assert steps[-10:] == list(range(10))
    assert len(steps) == 10 + 21 - step // 6 * 6


def test_a_finished_run_is_not_trained_again(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    before = hash_files(run)
    monkeypatch.setattr(TrainingLoop, "__init__", None)
    curate_small(run.plan)
    assert hash_files(run) == before


def test_parts_that_a_killed_run_left_are_removed_by_the_next_run(folder: Path) -> None:
    """The process that committed the whole output was killed before it removed the parts."""
    plan = small_plan(folder, root=f"{folder}/leftover")
    stage = curate_small(plan).folder.stage(0)
    parts = (stage.embedded(0), stage.decided(PLAN_PRUNING), stage.rewritten(PLAN_PRUNING, 0))
    for part in parts:
        with part.attempt("left", {}) as attempt:
            attempt.write("a", b"x")
    curate_small(plan)
    assert [part.root.url for part in parts if part.root.files()] == []


def test_contributions_in_the_ledger_equal_autograd(folder: Path) -> None:
    """The last segment is one step, so autograd can start from the checkpoint before it."""
    run = curate_small(
        small_plan(folder, root=f"{folder}/full", basis=ALL, dtype="float64", segment_steps=5)
    )
    stage = run.folder.stage(0)
    samples = read_stage_samples(run, 0)
    segment = read_segment(stage.segment(4))
    loop = TrainingLoop(run, 0, samples)
    loop.load_state(read_checkpoint(stage.segment(3)))
    assert segment.length == 1
    assert segment.samples.tolist() == loop.schedule.batch(20).tolist()
    basis = run.basis(run.bindings(loop.model))
    rows = []
    for position in range(len(segment.samples)):
        torch.manual_seed(loop.schedule.seed(20))  # the batch's dropout
        loop.model.zero_grad()
        losses = loop.task.losses(loop.model, loop.batch(segment.samples))
        torch.testing.assert_close(losses.detach(), segment.losses)
        (losses[position] * segment.weights[position]).backward()
        gradients = {n: p.grad for n, p in loop.model.named_parameters() if p.grad is not None}
        rows.append(basis.project_tensors(gradients))
    expected = torch.stack(rows)
    torch.testing.assert_close(segment.contributions, expected, rtol=1e-9, atol=1e-12)
    target = read_target_gradients(run, 0, "clean").mean(0)
    last = read_scores(run, 0).filter(pl.col("step") == 20)
    assert last["norm"].to_list() == pytest.approx(expected.norm(dim=1).tolist())
    mean = curate_small(
        small_plan(
            folder,
            root=f"{folder}/mean",
            basis=ALL,
            dtype="float64",
            segment_steps=5,
            score={"aggregate": "mean"},
        )
    )
    found = read_scores(mean, 0).filter(pl.col("step") == 20)["score_clean"].to_list()
    assert found == pytest.approx((expected @ target).tolist())


def test_tracin_is_rate_times_product_of_gradients_at_the_nearest_checkpoint(folder: Path) -> None:
    """For all parameters. Autograd gives the target's gradients at every checkpoint."""
    policy = {"policy": "tracin", "keep": 0.5}
    stages = [
        {"epochs": 3, "batch_size": 20, "prune": policy},
        {"steps": 2, "batch_size": 20, "prune": policy},
    ]
    schedule = {"kind": "cosine", "warmup": 0.2}
    settings = {
        "basis": ALL,
        "dtype": "float64",
        "segment_steps": 5,
        "schedule": schedule,
        "stages": stages,
    }
    run = curate_small(small_plan(folder, run="tracin", **settings))
    for stage, bounds in ((0, [0, 5, 10, 15, 20, 21]), (1, [0, 2])):
        stage_folder = run.folder.stage(stage)
        loop = TrainingLoop(run, stage, read_stage_samples(run, stage))
        before = run.folder.stage(0).start if stage == 0 else run.folder.stage(0).segment(4)
        target = list_target_samples(run, "clean")
        rows = torch.arange(24)
        gradients = []
        for checkpoint in (before, *stage_folder.segments()):
            loop.load_state(read_checkpoint(checkpoint), optimizer=False)
            loop.model.eval()
            loop.model.zero_grad()
            loop.task.losses(loop.model, loop.batch(rows, target)).mean().backward()
            found = {n: p.grad for n, p in loop.model.named_parameters() if p.grad is not None}
            gradients.append(run.basis(run.bindings(loop.model)).project_tensors(found))
        expected: dict[int, float] = {}
        for segment in map(read_segment, stage_folder.segments()):
            for step, row, contribution in zip(
                segment.steps, segment.samples, segment.contributions, strict=True
            ):
                distances = [abs(bound - int(step)) for bound in bounds]
                near = distances.index(min(distances))  # the earlier one of two as near
                rate = 0.2 * loop.schedule.rate_factor(int(step))
                value = rate * float(contribution @ gradients[near])
                expected[int(row)] = expected.get(int(row), 0.0) + value
        decisions = read_frame(stage_folder.prune(PLAN_PRUNING), "decisions.parquet").filter(
            pl.col("uses") > 0
        )
        assert decisions["score"].to_list() == pytest.approx(
            [expected[row] for row in decisions["sample"]], rel=1e-9
        )


def test_held_out_target_samples_do_not_score(folder: Path) -> None:
    """Scores equal those of a target with the scoring half only. Figures are of the other half."""
    shards = f"{folder}/target-0.tar"
    split = small_plan(folder, run="split", targets={"clean": {"shards": shards, "judging": 0.5}})
    held_out = held_out_rows(split, "clean", 24).tolist()
    write_shards(
        f"{folder}/score-%d.tar", [sample(200 + n) for n in range(24) if n not in held_out], 1
    )
    write_shards(f"{folder}/judge-%d.tar", [sample(200 + n) for n in held_out], 1)
    both = {
        "clean": {"shards": f"{folder}/score-0.tar"},
        "judge": {"shards": f"{folder}/judge-0.tar"},
    }
    runs = (
        curate_small(split),
        curate_small(small_plan(folder, run="halves", targets=both)),
    )
    scores, expected_scores = (read_scores(run, 0)["score_clean"].to_numpy() for run in runs)
    assert scores == pytest.approx(expected_scores, rel=1e-5, abs=1e-7)
    found, expected = (run.folder.stage(1).targets.manifest.facts for run in runs)
    assert found["clean"]["samples"] == 12
    assert found["clean"] == pytest.approx(expected["judge"], rel=1e-5)


def walk_back(run: Run, gradient: torch.Tensor, is_carried: bool) -> dict[int, list[float]]:
    """The scores of both stages, by walking a query back through every segment.

    No embedding and no transition is used.
    """
    spans = coupled_spans(run)
    slots = 2
    row = [
        torch.cat([gradient[:, None, s], torch.zeros_like(gradient[:, None, s])], 1) for s in spans
    ]
    found: dict[int, list[float]] = {}
    for stage in (1, 0):
        if stage == 0 and not is_carried:  # stage 1 began without the momentum of stage 0
            row = [torch.cat([r[:, :1], torch.zeros_like(r[:, 1:])], 1) for r in row]
        scores: list[float] = []
        for ledger in reversed(run.folder.stage(stage).segments()):
            effects, row = walk_segment(plan_dynamics(run, read_segment(ledger)), row)
            scores = torch.stack(effects).sum(0)[:, 0].tolist() + scores
        found[stage] = scores
    assert row[0].shape[1] == slots
    return found


@pytest.mark.parametrize("at_stage", ["reset", "carry"])
@pytest.mark.parametrize("coupling", ["block", "full"])
@pytest.mark.parametrize("index", ["flat", "sq8"])
def test_a_query_finds_the_samples_that_walking_it_back_finds(
    folder: Path, at_stage: str, coupling: str, index: str
) -> None:
    optimizer = {
        "kind": "sgd",
        "lr": 0.2,
        "momentum": 0.5,
        "weight_decay": 0.01,
        "at_stage": at_stage,
    }
    name = f"{at_stage}-{coupling}-{index}"
    plan = small_plan(
        folder,
        run=name,
        optimizer=optimizer,
        curvature={"kind": "empirical_fisher", "coupling": coupling},
        index=index,
        dtype="float64",
    )
    run = curate_small(plan)
    gradient = read_target_gradients(run, 1, "clean").mean(0, keepdim=True)
    expected = walk_back(run, gradient, at_stage == "carry")
    for stage in (0, 1):
        rows = read_scores(run, stage).with_columns(score=pl.Series(expected[stage]))
        for harmful in (False, True):
            for window in (None, 0):
                among = rows if window is None else rows.filter(pl.col("window") == window)
                ordered = among.sort("score", descending=not harmful).unique(
                    "key", keep="first", maintain_order=True
                )
                for estimate in ("embedding", "pull_back"):
                    hits = find_influential(
                        run, "clean", None, 7, harmful, stage, window, estimate
                    ).hits
                    assert [hit.key for hit in hits] == ordered["key"][:7].to_list()
                    assert [hit.score for hit in hits] == pytest.approx(
                        ordered["score"][:7].to_list(), rel=1e-4
                    )
    merged = pl.concat(
        [read_scores(run, s).with_columns(score=pl.Series(expected[s])) for s in (0, 1)]
    )
    best = (
        merged.sort("score", descending=True)
        .unique("key", keep="first", maintain_order=True)["key"][:5]
        .to_list()
    )
    assert [hit.key for hit in find_influential(run, "clean", top=5).hits] == best


def test_a_query_about_one_sample_uses_its_gradient(run: Run) -> None:
    hits = find_influential(run, sample="digit-0203", top=3).hits
    gradient = read_target_gradients(run, 1, "clean")[3:4]
    expected = walk_back(run, gradient, False)
    best = max(max(expected[0]), max(expected[1]))
    assert hits[0].score == pytest.approx(best, rel=1e-4)


@pytest.mark.parametrize("horizon", [0, 3, 100, "stage"])
def test_a_horizon_reads_effects_so_many_steps_later(folder: Path, horizon: int | str) -> None:
    """A horizon beyond the stage's end means the stage's end. 0 leaves out the learning rate."""
    plain = {"kind": "sgd", "lr": 0.2, "momentum": 0.5}

    def score(value: int | str) -> pl.DataFrame:
        settings = {"estimate": "embedding", "horizon": value, "aggregate": "mean"}
        plan = small_plan(
            folder, run=f"h{value}", optimizer=plain, score=settings, dtype="float64", seed=2
        )
        return read_scores(curate_small(plan), 0)

    found = score(horizon)
    end = score("stage")
    last = pl.col("step") == 20
    if horizon in (100, "stage"):
        assert found["score_clean"].to_list() == pytest.approx(
            end["score_clean"].to_list(), rel=1e-9
        )
    elif horizon == 0:
        scaled = found.filter(last)["score_clean"] * 0.2
        assert scaled.to_list() == pytest.approx(
            end.filter(last)["score_clean"].to_list(), rel=1e-9
        )
    else:
        late = pl.col("step") >= 18
        early = pl.col("step") < 16
        assert found.filter(late)["score_clean"].to_list() == pytest.approx(
            end.filter(late)["score_clean"].to_list()
        )
        assert found.filter(early)["score_clean"].to_list() != pytest.approx(
            end.filter(early)["score_clean"].to_list()
        )


@pytest.mark.parametrize("reduction", ["mean", "sum", "token_mean"])
def test_micro_batches_train_alike_for_every_reduction(folder: Path, reduction: str) -> None:
    """They change nothing but rounding. The recorder compares contributions with the gradient."""
    ends = []
    for parts in (1, 4):
        stages = [{"steps": 6, "batch_size": 20, "accumulate": parts}]
        task = {"factory": "tests.tasks.digits:Digits", "reduction": reduction}
        model = {"factory": "tests.tasks.digits:network", "args": {"dropout": 0.0}}
        optimizer = {"kind": "sgd", "lr": 0.01}
        plan = small_plan(
            folder,
            run=f"{reduction}{parts}",
            stages=stages,
            task=task,
            model=model,
            dtype="float64",
            optimizer=optimizer,
        )
        run = curate_small(plan)
        output = run.folder.stage(0).segment(0)
        ends.append((read_checkpoint(output), read_segment(output)))
    (one, whole), (other, split) = ends
    for name in one:
        torch.testing.assert_close(one[name], other[name])
    torch.testing.assert_close(
        whole.contributions.abs(), split.contributions.abs(), rtol=1e-6, atol=1e-9
    )
    torch.testing.assert_close(whole.weights, split.weights)


def test_a_stage_without_a_policy_passes_on_all_data(folder: Path) -> None:
    stages = [{"steps": 4, "batch_size": 20}, {"steps": 4, "batch_size": 20}]
    run = curate_small(small_plan(folder, run="through", stages=stages))
    assert len(read_stage_samples(run, 1)) == 140

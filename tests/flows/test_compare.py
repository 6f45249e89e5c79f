"""A comparison as a user runs it: shared outputs, kept samples, evaluation, and continuation."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch

from secateur.errors import PlanError
from secateur.flows import run_artifacts, tables
from secateur.flows.compare import compare
from secateur.flows.workers import InlineWorkers
from secateur.storage.frames import read_frame
from secateur.storage.layout import ComparisonFolder
from secateur.storage.ledger import read_checkpoint
from secateur.storage.outputs import Output, list_outputs
from secateur.tasks.comparison.comparison_report import Comparison
from secateur.tasks.data.held_out import held_out_rows
from secateur.tasks.data.samples import list_target_samples, read_stage_samples
from secateur.tasks.plan import Plan, WorkersConfig
from secateur.tasks.run import Run
from secateur.tasks.training.loop import TrainingLoop, eval_mode
from tests.flows.test_cli import secateur, sentence, write_plan
from tests.tasks.small import make_data, small_plan

ARMS = ("plan", "random", "unpruned", "el2n", "mean")
FURTHER = {"el2n": {"policy": "el2n"}, "mean": {"aggregate": "mean"}}
STAGES = [
    {"steps": 12, "batch_size": 20, "prune": {"policy": "threshold", "at_least": 0.0}},
    {"epochs": 2, "batch_size": 20},
]


@contextmanager
def inline_workers(config: WorkersConfig) -> Iterator[InlineWorkers]:
    yield InlineWorkers()


def compare_inline(plan: Plan, seeds: int = 2) -> Comparison:
    """Compare as the flow does, without Prefect."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("secateur.flows.compare.worker_pool", inline_workers)
        return compare.fn(plan, seeds, FURTHER)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("compare")
    make_data(made)
    return made


@pytest.fixture(scope="module")
def plan(folder: Path) -> Plan:
    return small_plan(folder, stages=STAGES)


@pytest.fixture(scope="module")
def comparison(plan: Plan) -> Comparison:
    return compare_inline(plan)


def open_arm(folder: Path, seed: int, arm: str) -> Run:
    """Return the run of an arm."""
    return Run.open(ComparisonFolder(f"{folder}/runs", "small").seed(seed).child(arm).url)


def outputs_by_place(run: Run) -> dict[str, Output]:
    """Return a run's outputs by their place in the run's folder."""
    outputs = list_outputs(run.folder.root)
    return {output.root.url.removeprefix(run.url): output for output in outputs}


def test_arms_share_the_first_stage_byte_for_byte(comparison: Comparison, folder: Path) -> None:
    not_shared = ("/plan", "/figures", "/stages/00/prune/plan")
    expected = {"/basis", "/stages/00/trained", "/stages/00/ledger/seg-00001", "/stages/00/targets"}
    for seed in (0, 1):
        shared = {
            place: output
            for place, output in outputs_by_place(open_arm(folder, seed, "plan")).items()
            if "/stages/01" not in place and place not in not_shared
        }
        assert expected <= set(shared)
        for arm in ARMS[1:]:
            outputs = outputs_by_place(open_arm(folder, seed, arm))
            for place, output in shared.items():
                own = outputs[place]
                if arm == "mean" and place in ("/stages/00/scores", "/stages/00/profile"):
                    assert own.fingerprint != output.fingerprint
                    continue
                assert own.fingerprint == output.fingerprint
                # They are neither trained again nor copied, but the same files.
                for name in output.names():
                    assert Path(own.url(name)).samefile(output.url(name))
    first, second = (open_arm(folder, seed, "plan").folder.stage(0) for seed in (0, 1))
    assert first.segment(0).fingerprint != second.segment(0).fingerprint


def test_controls_keep_as_many_as_the_plan(comparison: Comparison, folder: Path) -> None:
    for seed in (0, 1):
        kept = {arm: len(read_stage_samples(open_arm(folder, seed, arm), 1)) for arm in ARMS}
        assert kept["plan"] == kept["random"] == kept["el2n"]
        assert kept["unpruned"] == 140 > kept["plan"]


def test_held_out_samples_evaluate(comparison: Comparison, folder: Path) -> None:
    """Their loss is computed here from the last checkpoint of an arm."""
    (file,) = (file for file in comparison.files if file.endswith("figures.parquet"))
    frame = pl.read_parquet(file)
    assert frame["judges"].all()
    for arm in ARMS:
        run = open_arm(folder, 1, arm)
        loop = TrainingLoop(run, 1, read_stage_samples(run, 1))
        samples = list_target_samples(run, "clean")
        rows = held_out_rows(run.plan, "clean", len(samples))
        assert len(rows) == 12
        loop.load_state(read_checkpoint(run.folder.stage(1).segments()[-1]))
        with eval_mode(loop.model), torch.no_grad():
            losses = loop.task.losses(loop.model, loop.batch(rows, samples))
        row = frame.filter(arm=arm, seed=1, stage=1, figure="loss").row(0, named=True)
        assert row["value"] == pytest.approx(float(losses.mean()), rel=1e-5)
        assert row["steps"] == 2 * -(-row["samples"] // 20)


def test_the_result(comparison: Comparison) -> None:
    arms = {arm.arm: arm for arm in comparison.arms}
    assert tuple(arms) == ARMS
    assert comparison.judge == "clean"
    assert arms["unpruned"].steps == 12 + 14 > arms["plan"].steps
    assert any("different numbers of steps" in note for note in comparison.notes)
    assert arms["random"].train_seconds > 0
    assert set(arms["plan"].differences["accuracy"]) == {"unpruned", "random"}
    table = {row["arm"]: row for row in run_artifacts.comparison_rows(comparison)}
    difference = arms["random"].differences["loss"]["unpruned"]
    assert table["random"]["loss minus unpruned"] == difference.text(signed=True)
    assert list(comparison.before) == ["loss", "accuracy"]
    assert "compared with no pruning, the plan changes the loss on clean by" in comparison.verdict
    assert [Path(file).suffix for file in comparison.files] == [".png", ".parquet", ".parquet"]
    assert all(Path(file).exists() for file in comparison.files)


def test_it_continues_where_it_was_interrupted(
    comparison: Comparison,
    plan: Plan,
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Interrupt an arm's last stage. Only the last segment is trained again, to equal figures."""
    run = open_arm(folder, 1, "random")
    before = read_frame(run.folder.figures, "figures.parquet")
    run.folder.figures.remove()
    stage = run.folder.stage(1)
    for output in (stage.trained, stage.targets, stage.segments()[-1]):
        output.remove()
    take_step = TrainingLoop.step
    steps = []

    def note_step(loop: TrainingLoop, step: int, *recording: Any) -> Any:
        steps.append((loop.run.plan.run, loop.schedule.number, step))
        return take_step(loop, step, *recording)

    monkeypatch.setattr(TrainingLoop, "step", note_step)
    again = compare_inline(plan)
    last = before.filter(stage=1)["steps"][0]
    assert steps == [("random", 1, step) for step in range((last - 1) // 6 * 6, last)]
    after = read_frame(open_arm(folder, 1, "random").folder.figures, "figures.parquet")
    untimed = pl.exclude("train_seconds", "select_seconds")
    assert after.select(untimed).equals(before.select(untimed))
    assert after["select_seconds"].null_count() == len(after)
    tables.print_comparison(again)
    printed = capsys.readouterr().out
    assert all(f"│ {arm} " in printed for arm in ARMS)
    assert comparison.verdict == again.verdict
    assert again.verdict in printed


def test_the_first_pruning_may_come_later(folder: Path) -> None:
    short = {"steps": 4, "batch_size": 20}
    pruned = short | {"prune": {"policy": "top", "keep": 0.5}}
    plan = small_plan(folder, run="late", stages=[short, pruned, short])
    arms = {arm.arm: arm for arm in compare_inline(plan, 1).arms}
    seed = ComparisonFolder(plan.root, plan.run).seed(0)
    own, *others = (Run.open(seed.child(arm).url) for arm in ARMS)
    for run in others:
        for stage in (0, 1):
            ledgers = [one.folder.stage(stage).segment(0) for one in (own, run)]
            first, second = (Path(ledger.url("ledger.safetensors")) for ledger in ledgers)
            assert second.samefile(first)
    assert arms["unpruned"].samples == 140 > arms["plan"].samples
    assert arms["plan"].samples == arms["random"].samples == arms["mean"].samples
    assert {arm.steps for arm in arms.values()} == {12.0}


@pytest.mark.slow
def test_the_command(folder: Path) -> None:
    plan = write_plan(folder, run="command", stages=STAGES)
    done = secateur("compare", plan, "--seeds", "1", "--arm", "near=horizon:3", "--json")
    assert done.returncode == 0, done.stderr
    assert "compare command: seed 0, arm near (4 of 4)" in done.stderr
    assert [arm["arm"] for arm in json.loads(done.stdout)["arms"]] == [
        "plan",
        "random",
        "unpruned",
        "near",
    ]
    assert "one seed gives no interval" in json.loads(done.stdout)["verdict"]


def test_mistakes_of_a_user_are_one_sentence(plan: Plan, folder: Path) -> None:
    assert "--arm x=loss is not an arm" in sentence(
        secateur("compare", write_plan(folder), "--arm", "x=loss")
    )
    wrong = plan.model_copy(update={"run": "wrong"})
    misspelled: dict[str, Any] = {"x": {"polcy": "loss"}}
    contradictory: dict[str, Any] = {"x": {"at_least": 1.0, "policy": "top"}}
    for arms, judge, expected in (
        (misspelled, None, "unknown key `polcy`"),
        (contradictory, None, "unknown key `stages.0.prune.at_least`"),
        ({}, "nobody", "--judge nobody is none of"),
    ):
        with pytest.raises(PlanError, match=expected):
            compare.fn(wrong, 2, arms, judge)
    assert not (folder / "runs/wrong-compare").exists()

"""A comparison as a user runs it: what arms share, what they keep, who judges, and how it goes on."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch

from secateur.errors import PlanError
from secateur.flows import run_artifacts, tables
from secateur.flows.compare import compare
from secateur.flows.workers import WorkerPool
from secateur.storage.frames import read_frame
from secateur.storage.integrity import list_outputs
from secateur.storage.layout import ComparisonFolder
from secateur.storage.ledger import read_checkpoint
from secateur.tasks.comparison.comparison_report import Comparison
from secateur.tasks.data.samples import held_out_rows, list_target_samples, read_stage_samples
from secateur.tasks.plan import Plan
from secateur.tasks.run.run import Run
from secateur.tasks.training.loop import TrainingLoop, eval_mode
from tests.flows.test_cli import secateur, sentence, write_plan
from tests.tasks.small import make_data, small_plan

ARMS = ("plan", "random", "unpruned", "el2n", "mean")
FURTHER = {"el2n": {"policy": "el2n"}, "mean": {"aggregate": "mean"}}
STAGES = [
    {"steps": 12, "batch_size": 20, "prune": {"policy": "threshold", "at_least": 0.0}},
    {"epochs": 2, "batch_size": 20},
]


class Here(WorkerPool):
    """Does every task in this process, as a plain function."""

    def call(self, task: Any, *args: Any) -> Any:  # type: ignore[override]
        return task.fn(*args)

    def map(self, calls: Any, *_: Any) -> None:
        for call in calls:
            self.call(call.task, *call.arguments)


def compared(plan: Plan, seeds: int = 2) -> Comparison:
    """What the flow does, without Prefect."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("secateur.flows.compare.worker_pool", lambda spec: nullcontext(Here(spec)))
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
def found(plan: Plan) -> Comparison:
    return compared(plan)


def run_of(folder: Path, seed: int, arm: str) -> Run:
    return Run.open(ComparisonFolder(f"{folder}/runs", "small").seed(seed).child(arm).url)


def test_arms_share_the_first_stage_byte_for_byte(found: Comparison, folder: Path) -> None:
    for seed in (0, 1):
        own = run_of(folder, seed, "plan")
        first = {
            a.root.url.removeprefix(own.url): a
            for a in list_outputs(own.folder.root)
            if "/stages/01" not in a.root.url
        }
        shared = {
            place: a
            for place, a in first.items()
            if place not in ("/plan", "/figures", "/stages/00/prune/plan")
        }
        assert {
            "/basis",
            "/stages/00/trained",
            "/stages/00/ledger/seg-00001",
            "/stages/00/targets",
        } <= set(shared)
        for arm in ARMS[1:]:
            run = run_of(folder, seed, arm)
            theirs = {a.root.url.removeprefix(run.url): a for a in list_outputs(run.folder.root)}
            for place, artefact in shared.items():
                if arm == "mean" and place in ("/stages/00/scores", "/stages/00/profile"):
                    assert theirs[place].fingerprint != artefact.fingerprint
                    continue
                assert theirs[place].fingerprint == artefact.fingerprint
                for name in artefact.names():  # not trained again, nor copied: the same file
                    assert Path(theirs[place].url(name)).samefile(artefact.url(name))
    assert (
        run_of(folder, 0, "plan").folder.stage(0).segment(0).fingerprint
        != run_of(folder, 1, "plan").folder.stage(0).segment(0).fingerprint
    )


def test_controls_keep_as_many_as_the_plan(found: Comparison, folder: Path) -> None:
    for seed in (0, 1):
        kept = {arm: len(read_stage_samples(run_of(folder, seed, arm), 1)) for arm in ARMS}
        assert kept["plan"] == kept["random"] == kept["el2n"]
        assert kept["unpruned"] == 140 > kept["plan"]


def test_the_judge_is_the_half_that_does_not_score(found: Comparison, folder: Path) -> None:
    """Its loss from the last checkpoint of an arm, by hand."""
    frame = pl.read_parquet(next(file for file in found.files if file.endswith("figures.parquet")))
    assert frame["judges"].all()
    for arm in ARMS:
        run = run_of(folder, 1, arm)
        loop, samples = (
            TrainingLoop(run, 1, read_stage_samples(run, 1)),
            list_target_samples(run, "clean"),
        )
        rows = held_out_rows(run.plan, "clean", len(samples))
        assert len(rows) == 12
        loop.restore(read_checkpoint(run.folder.stage(1).segments()[-1]))
        with eval_mode(loop.model), torch.no_grad():
            losses = loop.task.losses(loop.model, loop.batch(rows, samples))
        row = frame.filter(arm=arm, seed=1, stage=1, figure="loss").row(0, named=True)
        assert row["value"] == pytest.approx(float(losses.mean()), rel=1e-5)
        assert row["steps"] == 2 * -(-row["samples"] // 20)


def test_the_answer(found: Comparison) -> None:
    arms = {arm.arm: arm for arm in found.arms}
    assert tuple(arms) == ARMS
    assert found.judge == "clean"
    assert arms["unpruned"].steps == 12 + 14 > arms["plan"].steps
    assert any("different numbers of steps" in note for note in found.notes)
    assert arms["random"].train_seconds > 0
    assert set(arms["plan"].differences["accuracy"]) == {"unpruned", "random"}
    table = {row["arm"]: row for row in run_artifacts.comparison_rows(found)}
    assert table["random"]["loss less unpruned"] == arms["random"].differences["loss"][
        "unpruned"
    ].text(signed=True)
    assert list(found.before) == ["loss", "accuracy"]
    assert "the plan's loss on clean less that without pruning" in found.verdict
    assert [Path(file).suffix for file in found.files] == [".png", ".parquet", ".parquet"]
    assert all(Path(file).exists() for file in found.files)


def test_it_goes_on_where_it_was(
    found: Comparison,
    plan: Plan,
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An arm whose last stage was interrupted: its last segment alone is trained again, to the same figures."""
    run = run_of(folder, 1, "random")
    before = read_frame(run.folder.figures, "figures.parquet")
    run.folder.figures.remove()
    for artefact in (
        run.folder.stage(1).trained,
        run.folder.stage(1).targets,
        run.folder.stage(1).segments()[-1],
    ):
        artefact.remove()
    whole, taken = TrainingLoop.step, []

    def counted(loop: TrainingLoop, step: int, *recording: Any) -> Any:
        taken.append((loop.run.plan.run, loop.order.number, step))
        return whole(loop, step, *recording)

    monkeypatch.setattr(TrainingLoop, "step", counted)
    again = compared(plan)
    last = before.filter(stage=1)["steps"][0]
    assert taken == [("random", 1, step) for step in range((last - 1) // 6 * 6, last)]
    after = read_frame(run_of(folder, 1, "random").folder.figures, "figures.parquet")
    untimed = pl.exclude("train_seconds", "select_seconds")
    assert after.select(untimed).equals(before.select(untimed))
    assert after["select_seconds"].null_count() == len(after)
    tables.print_comparison(again)
    printed = capsys.readouterr().out
    assert all(f"│ {arm} " in printed for arm in ARMS)
    assert found.verdict == again.verdict
    assert again.verdict in printed


def test_the_first_pruning_may_come_later(folder: Path) -> None:
    short = {"steps": 4, "batch_size": 20}
    plan = small_plan(
        folder, run="late", stages=[short, short | {"prune": {"policy": "top", "keep": 0.5}}, short]
    )
    arms = {arm.arm: arm for arm in compared(plan, 1).arms}
    seed = ComparisonFolder(plan.root, plan.run).seed(0)
    own, *others = (Run.open(seed.child(arm).url) for arm in ARMS)
    for run in others:
        for stage in (0, 1):
            mine, theirs = (
                one.folder.stage(stage).segment(0).url("ledger.safetensors") for one in (own, run)
            )
            assert Path(theirs).samefile(mine)
    assert (
        arms["unpruned"].samples
        == 140
        > arms["plan"].samples
        == arms["random"].samples
        == arms["mean"].samples
    )
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


def test_what_a_user_gets_wrong_is_one_sentence(plan: Plan, folder: Path) -> None:
    assert "--arm x=loss is no arm" in sentence(
        secateur("compare", write_plan(folder), "--arm", "x=loss")
    )
    wrong = plan.model_copy(update={"run": "wrong"})
    for arms, judge, expected in (
        ({"x": {"polcy": "loss"}}, None, "unknown key `polcy`"),
        (
            {"x": {"at_least": 1.0, "policy": "top"}},
            None,
            "unknown key `stages.0.prune.top.at_least`",
        ),
        ({}, "nobody", "--judge nobody is none of"),
    ):
        with pytest.raises(PlanError, match=expected):
            compare.fn(wrong, 2, arms, judge)
    assert not (folder / "runs/wrong-compare").exists()

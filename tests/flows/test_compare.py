"""A comparison as a user runs it: what arms share, what they keep, who judges, and how it goes on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch

from storage.frames import read_frame
from storage.integrity import artefacts
from storage.ledger import read_checkpoint
from storage.run import ComparisonFolder
from tasks.loop import Loop, evaluating
from tasks.run import Run
from tasks.samples import stage_samples, target_samples
from tasks.targets import judging_rows
from tests.flows.test_cli import secateur, sentence, write_plan
from tests.tasks.small import make_data

OPTIONS = ("--seeds", "2", "--arm", "el2n", "--arm", "mean=aggregate:mean")
ARMS = ("plan", "random", "unpruned", "el2n", "mean")
STAGES = [
    {"steps": 12, "batch_size": 20, "prune": {"policy": "threshold", "at_least": 0.0}},
    {"epochs": 2, "batch_size": 20},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("compare")
    make_data(made)
    return made


@pytest.fixture(scope="module")
def plan(folder: Path) -> str:
    return write_plan(folder, stages=STAGES)


@pytest.fixture(scope="module")
def found(plan: str) -> Any:
    done = secateur("compare", plan, *OPTIONS, "--json")
    assert done.returncode == 0, done.stderr
    assert "compare small: seed 1, arm unpruned (8 of 10)" in done.stderr
    return json.loads(done.stdout)


def run_of(folder: Path, seed: int, arm: str) -> Run:
    return Run.open(ComparisonFolder(f"{folder}/runs", "small").seed(seed).child(arm).url)


def test_arms_share_the_first_stage_byte_for_byte(found: Any, folder: Path) -> None:
    for seed in (0, 1):
        own = run_of(folder, seed, "plan")
        first = {
            a.root.url.removeprefix(own.url): a for a in artefacts(own.folder.root) if "/stages/01" not in a.root.url
        }
        shared = {place: a for place, a in first.items() if place not in ("/plan", "/figures", "/stages/00/prune/plan")}
        assert {"/basis", "/stages/00/trained", "/stages/00/ledger/seg-00001", "/stages/00/targets"} <= set(shared)
        for arm in ARMS[1:]:
            run = run_of(folder, seed, arm)
            theirs = {a.root.url.removeprefix(run.url): a for a in artefacts(run.folder.root)}
            for place, artefact in shared.items():
                if (arm, place) == ("mean", "/stages/00/scores"):
                    assert theirs[place].fingerprint != artefact.fingerprint
                    continue
                assert theirs[place].fingerprint == artefact.fingerprint
                for name in artefact.names():  # not trained again, nor copied: the same file
                    assert Path(theirs[place].url(name)).samefile(artefact.url(name))
    assert (
        run_of(folder, 0, "plan").folder.stage(0).segment(0).fingerprint
        != run_of(folder, 1, "plan").folder.stage(0).segment(0).fingerprint
    )


def test_controls_keep_as_many_as_the_plan(found: Any, folder: Path) -> None:
    for seed in (0, 1):
        kept = {arm: len(stage_samples(run_of(folder, seed, arm), 1)) for arm in ARMS}
        assert kept["plan"] == kept["random"] == kept["el2n"]
        assert kept["unpruned"] == 140 > kept["plan"]


def test_the_judge_is_the_half_that_does_not_score(found: Any, folder: Path) -> None:
    """Its loss from the last checkpoint of an arm, by hand."""
    frame = pl.read_parquet(next(file for file in found["files"] if file.endswith("figures.parquet")))
    assert frame["judges"].all()
    for arm in ARMS:
        run = run_of(folder, 1, arm)
        loop, samples = Loop(run, 1, stage_samples(run, 1)), target_samples(run, "clean")
        rows = judging_rows(run.plan, "clean", len(samples))
        assert len(rows) == 12
        loop.restore(read_checkpoint(run.folder.stage(1).segments()[-1]))
        with evaluating(loop.model), torch.no_grad():
            losses = loop.task.losses(loop.model, loop.batch(rows, samples))
        row = frame.filter(arm=arm, seed=1, stage=1, figure="loss").row(0, named=True)
        assert row["value"] == pytest.approx(float(losses.mean()), rel=1e-5)
        assert row["steps"] == 2 * -(-row["samples"] // 20)


def test_the_answer(found: Any, folder: Path) -> None:
    arms = {arm["arm"]: arm for arm in found["arms"]}
    assert tuple(arms) == ARMS
    assert found["judge"] == "clean"
    assert arms["unpruned"]["steps"] == 12 + 14 > arms["plan"]["steps"]
    assert any("different numbers of steps" in note for note in found["notes"])
    assert arms["random"]["train_seconds"] > 0
    assert set(arms["plan"]["differences"]["accuracy"]) == {"unpruned", "random"}
    assert "the plan's loss on clean less that without pruning" in found["verdict"]
    assert [Path(file).suffix for file in found["files"]] == [".png", ".parquet", ".parquet"]
    assert all(Path(file).exists() for file in found["files"])


def test_it_goes_on_where_it_was(found: Any, plan: str, folder: Path) -> None:
    """An arm whose last stage was interrupted: nothing else is made again, and the figures are the same."""
    run = run_of(folder, 1, "random")
    before = read_frame(run.folder.figures, "figures.parquet")
    kept = {arm: run_of(folder, 1, arm).folder.stage(1).segment(0).manifest.attempt for arm in ARMS}
    run.folder.figures.remove()
    for artefact in (run.folder.stage(1).trained, run.folder.stage(1).targets, run.folder.stage(1).segments()[-1]):
        artefact.remove()
    done = secateur("compare", plan, *OPTIONS)
    assert done.returncode == 0, done.stderr
    after = read_frame(run_of(folder, 1, "random").folder.figures, "figures.parquet")
    untimed = pl.exclude("train_seconds", "select_seconds")
    assert after.select(untimed).equals(before.select(untimed))
    assert after["select_seconds"].null_count() == len(after)
    assert {arm: run_of(folder, 1, arm).folder.stage(1).segment(0).manifest.attempt for arm in ARMS} == kept
    assert all(f"│ {arm} " in done.stdout for arm in ARMS)
    assert found["verdict"] in done.stdout


def test_what_a_user_gets_wrong_is_one_sentence(folder: Path) -> None:
    plan = write_plan(folder, run="wrong", stages=STAGES)
    assert "the arm x: unknown key `polcy`" in sentence(secateur("compare", plan, "--arm", "x=polcy:loss"))
    assert "--judge nobody is none of" in sentence(secateur("compare", plan, "--judge", "nobody"))
    assert not (folder / "runs/wrong-compare").exists()

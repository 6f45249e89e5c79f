"""When a stage counts as trained, and by which trainer."""

from __future__ import annotations

from pathlib import Path

import pytest

from secateur.errors import PlanError
from secateur.tasks.analysis.audit import write_audit
from secateur.tasks.reporting.dry_run import estimate_audit_cost
from secateur.tasks.results.training_results import SECATEUR, TrainingResult, end_checkpoint
from secateur.tasks.run import Run
from secateur.tasks.training.loop import TrainingLoop
from secateur.tasks.training.segments import commit_training_result
from secateur.tasks.training.train import train_stage
from secateur.tasks.valuation.replay import replay_stage
from tests.tasks.small import curate_small, make_data, small_plan


@pytest.fixture
def run(tmp_path: Path) -> Run:
    make_data(tmp_path)
    return curate_small(small_plan(tmp_path, stages=[{"steps": 9, "batch_size": 20}]))


def test_a_trained_stage_has_its_training_result(run: Run) -> None:
    expected = TrainingResult(stage=0, samples=140, steps=9, segments=2, by=SECATEUR)
    assert train_stage(run, 0) == expected
    folder = run.folder.stage(0)
    assert folder.trained.manifest.inputs == {"segment": folder.segment(1).fingerprint}
    assert end_checkpoint(run, 0).root.url == folder.segment(1).root.url


def test_a_trainer_killed_after_the_last_segment_finishes_the_stage_later(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    run.folder.stage(0).trained.remove()
    with pytest.raises(PlanError, match=r"stage 0 of .* is not trained to its end"):
        end_checkpoint(run, 0)
    monkeypatch.setattr(TrainingLoop, "__init__", None)
    assert train_stage(run, 0).segments == 2
    assert run.folder.stage(0).trained.committed


def test_a_stage_that_another_trainer_trained_cannot_be_repeated(run: Run) -> None:
    folder = run.folder.stage(0)
    folder.trained.remove()
    commit_training_result(
        run, TrainingResult(stage=0, samples=140, steps=9, segments=2, by="outside")
    )
    for repeat in (replay_stage, write_audit, estimate_audit_cost):
        with pytest.raises(
            PlanError,
            match=r"was trained by another trainer \(outside\), whose steps cannot be repeated",
        ):
            repeat(run, 0)
    assert train_stage(run, 0).by == "outside"


def test_two_trainers_do_not_share_a_stage(run: Run) -> None:
    folder = run.folder.stage(0)
    folder.trained.remove()
    folder.segment(1).remove()
    first = folder.segment(0)
    facts = dict(first.manifest.facts, by="outside")
    first.remove()
    with first.attempt("segment", {}) as attempt:
        attempt.facts.update(facts)
    with pytest.raises(PlanError, match=r"stage 0 of .* was begun by another trainer \(outside\)"):
        train_stage(run, 0)

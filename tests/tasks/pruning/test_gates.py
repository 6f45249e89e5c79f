"""Audits and trust gates: retraining, its cost, and what is pruned if a gate does not hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import polars as pl
import pytest
from scipy.stats import spearmanr

from secateur.errors import PlanError
from secateur.storage.layout import PLAN_PRUNING
from secateur.tasks.analysis.audit import write_audit
from secateur.tasks.analysis.retraining import expected_audit_cost
from secateur.tasks.data.batches import BatchSchedule
from secateur.tasks.data.held_out import held_out_rows, scoring_rows
from secateur.tasks.data.samples import read_stage_samples
from secateur.tasks.reporting.dry_run import estimate_run
from secateur.tasks.results.audit_results import read_audit, read_audit_frame
from secateur.tasks.results.pruning_results import read_decisions
from secateur.tasks.run import Run
from secateur.tasks.training.loop import TrainingLoop
from tests.tasks.small import curate_small, make_data, small_plan
from tests.tasks.valuation.test_replay import loss_without

EFFECT = {"estimate": "embedding", "horizon": "stage", "aggregate": "mean"}
AUDIT = {"removals": 12, "stages": [0]}
PLAIN = {"kind": "sgd", "lr": 0.2, "momentum": 0.5}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trust")
    make_data(folder)
    return folder


@pytest.fixture(scope="module")
def run(folder: Path) -> Run:
    return curate_small(
        small_plan(folder, score=EFFECT, audit=AUDIT, dtype="float64", optimizer=PLAIN)
    )


def test_the_truth_equals_retraining_without_the_sample(run: Run) -> None:
    frame = read_audit_frame(run, 0)
    base = loss_without(run, 0, -1, 0.0)
    for step, row, truth in frame.select("step", "sample", "truth").iter_rows():
        assert truth == pytest.approx(loss_without(run, step, row, 1.0) - base, rel=1e-6, abs=1e-10)


def test_removals_are_spread_over_the_stage(run: Run) -> None:
    steps = read_audit_frame(run, 0)["step"].to_list()
    assert steps == sorted(steps)
    assert steps[2] < 5 <= 16 <= steps[-1]
    assert len(set(steps)) > 6


def test_an_audits_figures_follow_from_its_table(run: Run) -> None:
    frame = read_audit_frame(run, 0)
    result = read_audit(run, 0)
    for name, fidelity in result.fidelity.items():
        assert fidelity.spearman == pytest.approx(
            float(spearmanr(frame[name], frame["truth"]).statistic)
        )
        low, high = fidelity.spearman_interval
        assert low <= fidelity.spearman <= high
    assert result.fidelity["replay"].spearman > 0.9
    assert Path(result.plot).read_bytes().startswith(b"\x89PNG")


def test_the_cost_of_an_audit_is_predicted(run: Run) -> None:
    schedule = BatchSchedule(run.plan, 0, len(read_stage_samples(run, 0)))
    expected = expected_audit_cost(run.plan, schedule)
    assert read_audit(run, 0).cost == pytest.approx(expected, rel=0.1)
    assert estimate_run(run.plan).audits == {0: expected}


def test_an_audit_over_its_budget_is_refused_before_it_trains(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TrainingLoop, "step", None)
    with pytest.raises(
        PlanError,
        match=r"with 90 removals would cost \d+\.\d trainings of the stage, and the plan allows 50",
    ):
        write_audit(run, 0, 90)
    with pytest.raises(PlanError, match="has 200 recorded uses, fewer than 400 removals"):
        write_audit(run, 0, 400)


def test_an_interrupted_audit_continues(
    run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = small_plan(
        folder, run="resumed", score=EFFECT, dtype="float64", optimizer=PLAIN, audit=AUDIT
    )
    take_step = TrainingLoop.step
    steps = 0

    def interrupt_once(loop: TrainingLoop, step: int, recording: object = None) -> object:
        nonlocal steps
        steps += bool(loop.excluded)
        if steps == 40:
            steps += 1
            raise KeyboardInterrupt
        return take_step(loop, step, recording)  # type: ignore[arg-type]

    monkeypatch.setattr(TrainingLoop, "step", interrupt_once)
    with pytest.raises(KeyboardInterrupt):
        curate_small(plan)
    assert read_audit_frame(curate_small(plan), 0).equals(read_audit_frame(run, 0))


@pytest.mark.parametrize(("least", "kept"), [(-1.0, 77), (1.0, 140)])
def test_min_fidelity_prunes_or_keeps_all_samples(folder: Path, least: float, kept: int) -> None:
    run = curate_small(
        small_plan(
            folder,
            run=f"gate{least}",
            score=EFFECT,
            audit={"removals": 8, "stages": []},
            trust={"min_fidelity": least},
        )
    )
    decisions = read_decisions(run, 0)
    facts = run.folder.stage(0).prune(PLAN_PRUNING).manifest.facts
    assert decisions["keep"].sum() == kept
    assert facts["trust"]["min_fidelity"]["holds"] is (kept < 140)
    if kept == 140:
        assert (
            "under the plan's 1"
            in decisions.filter(pl.col("reason").str.contains("audit"))["reason"][0]
        )
        assert len(read_stage_samples(run, 1)) == 140


def test_a_gate_may_end_the_run(folder: Path) -> None:
    trust = {"min_fidelity": 1.0, "otherwise": "fail"}
    with pytest.raises(
        PlanError, match=r"stage 0 of .* is not pruned: the audit's Spearman correlation is"
    ):
        curate_small(
            small_plan(
                folder, run="fail", score=EFFECT, audit={"removals": 8, "stages": []}, trust=trust
            )
        )
    assert not (folder / "runs/fail/stages/00/prune").exists()


def test_a_trial_compares_the_kept_samples_with_random_ones(folder: Path) -> None:
    """If the kept samples train worse than random ones, nothing is dropped."""
    stages = [
        {"epochs": 2, "batch_size": 20, "prune": {"policy": "top", "keep": 0.3}},
        {"steps": 4, "batch_size": 20},
    ]
    common: dict[str, Any] = {
        "stages": stages,
        "trust": {"trial": {"steps": 30}},
        "optimizer": PLAIN,
    }
    good = curate_small(small_plan(folder, run="good", **common))
    facts = good.folder.stage(0).prune(PLAN_PRUNING).manifest.facts["trust"]["trial"]
    assert len(facts["random"]) == len(set(facts["seeds"])) == 3
    assert facts["holds"] is (facts["kept"] <= sum(facts["random"]) / 3)
    assert len(read_stage_samples(good, 1)) == (42 if facts["holds"] else 140)


def test_a_trial_that_does_not_hold_keeps_all_samples(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("secateur.tasks.pruning.gates.target_loss", _fixed_losses())
    run = curate_small(
        small_plan(folder, run="lost", trust={"trial": {"steps": 1}}, optimizer=PLAIN)
    )
    assert len(read_stage_samples(run, 1)) == 140
    reasons = read_decisions(run, 0)["reason"].unique().to_list()
    assert any(
        "the trial's loss is 3.0000 on the samples that are kept and 1.8333 on random ones"
        in reason
        for reason in reasons
    )


def _fixed_losses() -> Any:
    """The losses of four trainings: on the kept samples, then on three random draws."""
    values = iter([3.0, 1.0, 2.0, 2.5])
    return lambda *_: next(values)


def test_scoring_and_held_out_samples_do_not_overlap(folder: Path) -> None:
    plan = small_plan(folder, trust={"trial": {}})
    scoring = scoring_rows(plan, "clean", 24).tolist()
    held_out = held_out_rows(plan, "clean", 24).tolist()
    assert sorted(scoring + held_out) == list(range(24))
    assert len(held_out) == 12
    assert scoring_rows(small_plan(folder), "clean", 24).tolist() == list(range(24))


def test_min_fidelity_of_scores_that_are_not_effects_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"use `trust\.trial` for other scores"):
        small_plan(folder, trust={"min_fidelity": 0.5})

"""Audits and trust gates: retraining itself, its cost, and what is pruned when a gate does not hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import polars as pl
import pytest
from scipy.stats import spearmanr

from tasks.audit import audit, audit_frame, audited
from tasks.errors import PlanError
from tasks.estimate import estimate
from tasks.loop import Loop
from tasks.order import Order
from tasks.prune import OWN, stage_decisions
from tasks.removals import expected_cost
from tasks.run import Run
from tasks.samples import stage_samples
from tests.tasks.small import curate, make_data, small_plan
from tests.tasks.test_replay import loss_without

TSLOO = {"estimate": "embedding", "horizon": "stage", "aggregate": "mean"}
AUDIT = {"removals": 12, "stages": [0]}
PLAIN = {"kind": "sgd", "lr": 0.2, "momentum": 0.5}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("trust")
    make_data(made)
    return made


@pytest.fixture(scope="module")
def run(folder: Path) -> Run:
    return curate(small_plan(folder, score=TSLOO, audit=AUDIT, dtype="float64", optimizer=PLAIN))


def test_the_truth_is_retraining_without_the_sample(run: Run) -> None:
    frame = audit_frame(run, 0)
    base = loss_without(run, 0, -1, 0.0)
    for step, row, truth in frame.select("step", "sample", "truth").iter_rows():
        assert truth == pytest.approx(loss_without(run, step, row, 1.0) - base, rel=1e-6, abs=1e-10)


def test_removals_are_spread_over_the_stage(run: Run) -> None:
    steps = audit_frame(run, 0)["step"].to_list()
    assert steps == sorted(steps)
    assert steps[2] < 5 <= 16 <= steps[-1]
    assert len(set(steps)) > 6


def test_the_figures_are_those_of_the_table(run: Run) -> None:
    frame, found = audit_frame(run, 0), audited(run, 0)
    for name, fidelity in found.fidelity.items():
        assert fidelity.spearman == pytest.approx(float(spearmanr(frame[name], frame["truth"]).statistic))
        low, high = fidelity.spearman_interval
        assert low <= fidelity.spearman <= high
    assert found.fidelity["replay"].spearman > 0.9
    assert Path(found.plot).read_bytes().startswith(b"\x89PNG")


def test_its_cost_is_foretold(run: Run) -> None:
    order = Order(run.plan, 0, len(stage_samples(run, 0)))
    assert audited(run, 0).cost == pytest.approx(expected_cost(run.plan, order), rel=0.1)
    assert estimate(run.plan).audits == {0: expected_cost(run.plan, order)}


def test_an_audit_over_its_budget_is_refused_beforehand(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Loop, "step", None)
    with pytest.raises(
        PlanError, match=r"with 90 removals would cost \d+\.\d trainings of the stage, and the plan allows 50"
    ):
        audit.fn(run.url, 0, 90)
    with pytest.raises(PlanError, match="has 200 recorded uses, fewer than 400 removals"):
        audit.fn(run.url, 0, 400)


def test_an_interrupted_audit_carries_on(run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = small_plan(folder, run="resumed", score=TSLOO, dtype="float64", optimizer=PLAIN, audit=AUDIT)
    whole, taken = Loop.step, 0

    def interrupted(loop: Loop, step: int, recording: object = None) -> object:
        nonlocal taken
        taken += loop.left_out[0] >= 0
        if taken == 40:
            taken += 1
            raise KeyboardInterrupt
        return whole(loop, step, recording)  # type: ignore[arg-type]

    monkeypatch.setattr(Loop, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        curate(plan)
    assert audit_frame(curate(plan), 0).equals(audit_frame(run, 0))


@pytest.mark.parametrize(("least", "kept"), [(-1.0, 77), (1.0, 140)])
def test_min_fidelity_prunes_or_keeps_all(folder: Path, least: float, kept: int) -> None:
    run = curate(
        small_plan(
            folder, run=f"gate{least}", score=TSLOO, audit={"removals": 8, "stages": []}, trust={"min_fidelity": least}
        )
    )
    decisions = stage_decisions(run, 0)
    facts = run.folder.stage(0).prune(OWN).manifest.facts
    assert decisions["keep"].sum() == kept
    assert facts["trust"]["min_fidelity"]["holds"] is (kept < 140)
    if kept == 140:
        assert "under the plan's 1" in decisions.filter(pl.col("reason").str.contains("audit"))["reason"][0]
        assert len(stage_samples(run, 1)) == 140


def test_a_gate_may_fail_the_run(folder: Path) -> None:
    trust = {"min_fidelity": 1.0, "otherwise": "fail"}
    with pytest.raises(PlanError, match=r"stage 0 of .* is not pruned: the audit's Spearman correlation is"):
        curate(small_plan(folder, run="fail", score=TSLOO, audit={"removals": 8, "stages": []}, trust=trust))
    assert not (folder / "runs/fail/stages/00/prune").exists()


def test_a_trial_holds_what_is_kept_against_chance(folder: Path) -> None:
    """Keeping the samples of highest loss only is worse than chance, and so nothing is dropped."""
    stages = [{"epochs": 2, "batch_size": 20, "prune": {"policy": "top", "keep": 0.3}}, {"steps": 4, "batch_size": 20}]
    common: dict[str, Any] = {"stages": stages, "trust": {"trial": {"steps": 30}}, "optimizer": PLAIN}
    good = curate(small_plan(folder, run="good", **common))
    facts = good.folder.stage(0).prune(OWN).manifest.facts["trust"]["trial"]
    assert len(facts["random"]) == len(set(facts["seeds"])) == 3
    assert facts["holds"] is (facts["kept"] <= sum(facts["random"]) / 3)
    assert len(stage_samples(good, 1)) == (42 if facts["holds"] else 140)


def test_a_trial_that_is_lost_keeps_all(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tasks.trust.target_loss", _losses())
    run = curate(small_plan(folder, run="lost", trust={"trial": {"steps": 1}}, optimizer=PLAIN))
    assert len(stage_samples(run, 1)) == 140
    reasons = stage_decisions(run, 0)["reason"].unique().to_list()
    assert any("the trial's loss is 3.0000 on what is kept and 1.8333 at random" in reason for reason in reasons)


def _losses() -> Any:
    """Stands for four trainings: what is kept, then three draws."""
    values = iter([3.0, 1.0, 2.0, 2.5])
    return lambda *_: next(values)


def test_the_half_that_scores_does_not_judge(folder: Path) -> None:
    from tasks.samples import judging_rows, scoring_rows

    plan = small_plan(folder, trust={"trial": {}})
    score, judge = (rows(plan, "clean", 24).tolist() for rows in (scoring_rows, judging_rows))
    assert sorted(score + judge) == list(range(24))
    assert len(judge) == 12
    assert scoring_rows(small_plan(folder), "clean", 24).tolist() == list(range(24))


def test_min_fidelity_of_scores_that_are_no_effects_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"use `trust\.trial` for other scores"):
        small_plan(folder, trust={"min_fidelity": 0.5})

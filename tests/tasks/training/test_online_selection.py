"""Online selection in whole runs: what is chosen is right by hand, is kept, and is what every later part trains on again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

from secateur.errors import PlanError
from secateur.storage.frames import read_frame
from secateur.storage.ledger import read_checkpoint
from secateur.tasks.analysis.audit import read_audit_frame
from secateur.tasks.data.batches import BatchSchedule
from secateur.tasks.data.samples import (
    list_stage_samples,
    list_target_samples,
    read_stage_samples,
    scoring_rows,
)
from secateur.tasks.plan import Plan
from secateur.tasks.reporting.dry_run import JUDGING_COST, estimate_run
from secateur.tasks.run.run import Run
from secateur.tasks.training.fit_basis import fit_basis
from secateur.tasks.training.loop import TrainingLoop, eval_mode
from secateur.tasks.training.online_selection import (
    SELECTION,
    OnlineSelector,
    TargetGroups,
    read_selected_rows,
)
from secateur.tasks.training.train import train_stage
from secateur.tasks.valuation.embed import segment_of
from secateur.tasks.valuation.score import read_scores
from tests.tasks.small import curate_small, make_data, sample, small_plan
from tests.tasks.test_replay import ADAMW, REPLAYED, loss_without

SOME = {"kind": "coordinates", "numbers": 60, "fit_steps": 1}
ALL = SOME | {"numbers": None}
SGD = {"kind": "sgd", "lr": 0.2, "momentum": 0.5}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("select")
    make_data(made)
    return made


def stage(method: str = "greats", samples: int = 10, **changes: Any) -> dict[str, Any]:
    """One that selects early and late, with a gap between that does not."""
    select = {"method": method, "candidates": 3, "samples": samples}
    early = {"start": 0, "stop": 4, "unit": "steps", "select": select}
    late = {"start": 7, "stop": 10, "unit": "steps", "select": select}
    return {"steps": 10, "batch_size": 20, "windows": [early, late], **changes}


def plan_of(folder: Path, name: str, **changes: Any) -> Plan:
    settings = {"dtype": "float64", "optimizer": SGD, "basis": SOME, "segment_steps": 4, **changes}
    return small_plan(folder, run=name, **({"stages": [stage()]} | settings))


def trained(plan: Plan) -> Run:
    """A run whose first stage is trained and no more."""
    run = Run.start(plan)
    list_stage_samples.fn(run.url, 0)
    fit_basis.fn(run.url)
    train_stage.fn(run.url, 0)
    return run


def selection(run: Run) -> pl.DataFrame:
    folder = run.folder.stage(0)
    kept = [read_frame(s, SELECTION) for s in folder.segments() if "selection" in s.manifest.facts]
    return pl.concat(kept)


def gradients(loop: TrainingLoop, rows: Tensor, samples: Any = None) -> Tensor:
    """Each sample's own gradient by autograd, in the numbers of the basis."""
    basis = loop.run.basis(loop.run.bindings(loop.model))
    found = []
    with eval_mode(loop.model):
        for row in rows:
            loop.model.zero_grad()
            loop.task.losses(loop.model, loop.batch(row[None], samples)).sum().backward()
            found.append(
                basis.project_tensors(
                    {n: p.grad for n, p in loop.model.named_parameters() if p.grad is not None}
                )
            )
    return torch.stack(found)


def chosen_by_hand(run: Run, method: str, step: int, sizes: bool) -> tuple[list[int], list[float]]:
    """Rows in the order of their choice, from the checkpoint before the step, a sample at a time."""
    loop = TrainingLoop(run, 0, read_stage_samples(run, 0))
    loop.restore(read_checkpoint(run.folder.stage(0).segment(step - 1)))
    rows = loop.order.candidates(step, 3)
    weights = torch.full((60,), 1 / 20, dtype=torch.float64)
    if sizes:
        tokens = loop.sizes(loop.batch(rows), 60)
        weights = tokens / tokens.sum() * 3
    moves = (
        -0.2 * weights[:, None] * gradients(loop, rows)
    )  # with momentum too: the buffer takes the gradient whole
    target = list_target_samples(run, "clean")
    query = gradients(
        loop, torch.cat([r for r, _ in TargetGroups(loop, "clean", 10).group(step)]), target
    ).mean(0)
    picked: list[int] = []
    for _ in range(20):
        taken = moves[picked].sum(0) if picked and method == "greats" else torch.zeros_like(query)
        gains = [
            float("-inf") if i in picked else -float(m @ (query + taken))
            for i, m in enumerate(moves)
        ]
        picked.append(gains.index(max(gains)))
    return rows[picked].tolist(), (-moves @ query).tolist()


@pytest.mark.parametrize(
    ("method", "reduction", "parts"), [("grad_align", "mean", 1), ("greats", "token_mean", 4)]
)
def test_the_choice_is_that_of_explicit_gradients(
    folder: Path, method: str, reduction: str, parts: int
) -> None:
    """Whatever the micro-batches, and with a dropout that candidates are judged without."""
    plan = plan_of(
        folder, f"hand-{method}", stages=[stage(method, accumulate=parts)], segment_steps=1, basis=ALL,
        task={"factory": "tests.tasks.small:Digits", "reduction": reduction},
    )  # fmt: skip
    run = trained(plan)
    for step in (1, 3, 8):
        rows, scores = chosen_by_hand(run, method, step, reduction == "token_mean")
        frame = selection(run).filter(pl.col("step") == step)
        assert frame.filter("chosen").sort("rank")["sample"].to_list() == rows
        assert frame["score"].to_list() == pytest.approx(scores, rel=1e-9)
        assert segment_of(run.folder.stage(0).segment(step)).samples.tolist() == rows


def test_what_was_decided_is_in_the_ledger(folder: Path) -> None:
    run = curate_small(plan_of(folder, "ledger", stages=[stage(), {"steps": 3, "batch_size": 20}]))
    frame, order = selection(run), BatchSchedule(run.plan, 0, 140)
    assert frame["step"].unique().sort().to_list() == [0, 1, 2, 3, 7, 8, 9]
    counts = frame.group_by("step").agg(
        pl.len(), pl.col("chosen").sum(), pl.col("sample").n_unique().alias("apart")
    )
    assert counts.select("len", "chosen", "apart").unique().rows() == [(60, 20, 60)]
    assert frame.filter(pl.col("step") >= 7)["window"].unique().to_list() == [1]
    assert sorted(frame["reason"].unique()) == [
        "chosen: among the 20 of 60 of largest gain",
        "passed over: not among the 20 of 60 of largest gain",
    ]
    best = frame.filter((pl.col("step") == 1) & (pl.col("rank") == 1))["gain"][0]
    assert best == frame.filter(pl.col("step") == 1)["gain"].max()
    samples = torch.cat([segment_of(s).samples for s in run.folder.stage(0).segments()]).view(
        10, 20
    )
    for step in range(10):
        mine = (
            frame.filter((pl.col("step") == step) & pl.col("chosen"))
            .sort("rank")["sample"]
            .to_list()
        )
        assert samples[step].tolist() == (mine or order.batch(step).tolist())
    trained = train_stage.fn(run.url, 0)
    assert (trained.candidates, trained.chosen) == (7 * 60, 7 * 20)
    assert train_stage.fn(run.url, 1).candidates == 0
    assert read_selected_rows(run.folder.stage(1)) == {}


def test_chance_is_the_control(folder: Path) -> None:
    run = trained(plan_of(folder, "random", stages=[stage("random")]))
    again = trained(plan_of(folder, "random", root=f"{folder}/again", stages=[stage("random")]))
    assert selection(run).equals(selection(again))
    assert selection(run)["score"].null_count() == len(selection(run))
    other = trained(
        plan_of(folder, "random", root=f"{folder}/seed", seed=1, stages=[stage("random")])
    )
    assert not selection(run).equals(selection(other))


@pytest.mark.parametrize("optimizer", [SGD, ADAMW])
def test_replay_is_the_derivative_of_training_on_what_was_chosen(
    folder: Path, optimizer: dict[str, Any]
) -> None:
    """The truth trains again with the choice held fixed; replay's own check holds its end against the checkpoints."""
    run = curate_small(
        plan_of(
            folder, f"replay-{optimizer['kind']}", optimizer=optimizer, score=REPLAYED, replay={"step": 1e-5},
            stages=[stage(accumulate=2)], basis={"kind": "coordinates", "numbers": 100},
        )
    )  # fmt: skip
    scores = read_scores(run, 0)
    for use in (0, 45, 79, 139):
        step, row = int(scores["step"][use]), int(scores["sample"][use])
        up, down = (loss_without(run, step, row, sign * 1e-4) for sign in (1, -1))
        assert scores["score_clean"][use] == pytest.approx((up - down) / 2e-4, rel=1e-3, abs=1e-9)


def test_embeddings_with_the_hessian_agree_with_replay(folder: Path) -> None:
    common: dict[str, Any] = {
        "optimizer": ADAMW, "basis": ALL, "replay": {"step": 1e-5},
        "curvature": {"kind": "hessian", "coupling": "full", "every": 1},
        "model": {"factory": "tests.tasks.small:network", "args": {"width": 4}},
    }  # fmt: skip
    embedded = curate_small(
        plan_of(folder, "he", score=REPLAYED | {"estimate": "embedding"}, **common)
    )
    exact = curate_small(plan_of(folder, "hr", score=REPLAYED, **common))
    found, expected = (read_scores(run, 0)["score_clean"].to_numpy() for run in (embedded, exact))
    assert found == pytest.approx(expected, rel=1e-3, abs=1e-7)


def test_a_hessian_of_coming_steps_reads_those_that_are_known(folder: Path) -> None:
    run = curate_small(
        plan_of(folder, "ahead", curvature={"kind": "hessian", "every": 4, "coupling": "full"})
    )
    assert segment_of(run.folder.stage(0).segment(1)).hessian_steps.tolist() == [4]
    assert read_scores(run, 0)["score_clean"].is_finite().all()


def test_an_audit_leaves_exactly_the_sample_out(folder: Path) -> None:
    score = REPLAYED | {"estimate": "embedding"}
    run = curate_small(plan_of(folder, "audit", score=score, audit={"removals": 6, "stages": [0]}))
    base = loss_without(run, 0, -1, 0.0)
    for step, row, truth in read_audit_frame(run, 0).select("step", "sample", "truth").iter_rows():
        assert truth == pytest.approx(loss_without(run, step, row, 1.0) - base, rel=1e-6, abs=1e-10)
        assert truth != 0


@pytest.mark.parametrize("step", [2, 9])
def test_an_interrupted_stage_carries_on_to_the_same_bytes(
    folder: Path, step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = trained(plan_of(folder, "whole"))
    plan, choose = plan_of(folder, "whole", root=f"{folder}/resumed{step}"), OnlineSelector.choose

    def interrupted(selector: OnlineSelector, number: int) -> None:
        choose(selector, number)
        if number == step:
            raise KeyboardInterrupt

    monkeypatch.setattr(OnlineSelector, "choose", interrupted)
    with pytest.raises(KeyboardInterrupt):
        trained(plan)
    monkeypatch.setattr(OnlineSelector, "choose", choose)
    resumed = trained(plan)
    for one, other in zip(
        whole.folder.stage(0).segments(), resumed.folder.stage(0).segments(), strict=True
    ):
        assert one.manifest.files == other.manifest.files


def test_the_basis_is_fitted_on_plain_steps(folder: Path) -> None:
    basis = {"kind": "kronecker", "method": "pca", "rank": 4, "fit_steps": 3}
    plain = trained(plan_of(folder, "plain", basis=basis, stages=[{"steps": 10, "batch_size": 20}]))
    chosen = trained(plan_of(folder, "chosen", basis=basis))
    assert plain.folder.basis.manifest.files == chosen.folder.basis.manifest.files
    one, other = (
        segment_of(run.folder.stage(0).segment(0)).samples.tolist() for run in (plain, chosen)
    )
    assert one != other


def test_rows_that_judge_do_not_select(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: set[int] = set()
    whole = TrainingLoop.batch

    def watched(loop: TrainingLoop, rows: Tensor, samples: Any = None) -> Any:
        read.update(rows.tolist() if samples is not None else [])
        return whole(loop, rows, samples)

    monkeypatch.setattr(TrainingLoop, "batch", watched)
    run = Run.start(plan_of(folder, "halves", trust={"trial": {}}))
    loop = TrainingLoop(run, 0, read_stage_samples(trained(plan_of(folder, "other")), 0))
    read.clear()
    target = TargetGroups(loop, "clean", 5)
    groups = [torch.cat([rows for rows, _ in target.group(step)]).tolist() for step in range(6)]
    scoring = scoring_rows(run.plan, "clean", 24).tolist()
    assert sorted(row for group in groups[:3] for row in group) == scoring
    assert groups[:3] == groups[3:]
    assert read == set(scoring)


@given(st.integers(60, 200), st.integers(2, 4), st.integers(1, 15))
def test_candidates_walk_through_the_data(samples: int, times: int, batch: int) -> None:
    order = BatchSchedule(
        small_plan(Path("/"), stages=[{"steps": 9, "batch_size": batch}]), 0, samples
    )
    steps = samples // (times * batch)
    walked = torch.cat([order.candidates(step, times) for step in range(steps)])
    assert len(walked) == steps * times * batch == len(set(walked.tolist()))
    ahead = order.candidates(steps, times)
    assert order.candidates(0, times).tolist() == walked[: times * batch].tolist()
    assert len(set(ahead.tolist())) == times * batch


def test_more_candidates_than_samples_are_refused(folder: Path) -> None:
    plan = plan_of(folder, "many", stages=[stage(batch_size=60)])
    for asked in (estimate_run, curate_small):
        with pytest.raises(
            PlanError, match="among 180 candidates a step and the stage has 140 samples; lower"
        ):
            asked(plan)


def test_a_target_that_the_plan_has_not_is_refused(folder: Path) -> None:
    windows = [{"select": {"target": "nobody"}}]
    with pytest.raises(
        ValidationError, match=r"select\.target nobody is none of the targets clean"
    ):
        plan_of(folder, "target", stages=[stage(windows=windows)])


def test_a_candidate_whose_loss_is_not_finite_is_named(folder: Path, tmp_path: Path) -> None:
    make_data(tmp_path, [sample(501, cls=b"nan")])
    with pytest.raises(
        PlanError, match=r"the loss of sample digit-0501 is nan at step \d of stage 0"
    ):
        trained(plan_of(tmp_path, "nan"))


def test_a_target_whose_loss_is_not_finite_is_named(folder: Path, tmp_path: Path) -> None:
    make_data(tmp_path, [sample(501, cls=b"nan")])
    bad = {"clean": {"shards": f"{tmp_path}/train-1.tar"}}
    with pytest.raises(PlanError, match="the loss of target clean is not finite at step"):
        curate_small(plan_of(folder, "nantarget", targets=bad, stages=[stage(samples=100)]))


def test_the_dry_run_says_what_selection_costs(folder: Path) -> None:
    found = estimate_run(
        plan_of(folder, "dry", stages=[stage(), {"steps": 4, "batch_size": 20}])
    ).selections
    assert list(found) == [0]
    assert (found[0].steps, found[0].judged) == (7, 7 * (60 + 10))
    assert found[0].cost == pytest.approx(JUDGING_COST * 490 / 200)
    by_chance = estimate_run(plan_of(folder, "dry", stages=[stage("random")])).selections[0]
    assert (by_chance.judged, by_chance.cost) == (0, 0.0)

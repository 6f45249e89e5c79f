"""Online selection in whole runs: the choice, its record, and training on it again."""

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
from secateur.tasks.data.batches import BatchSchedule
from secateur.tasks.data.held_out import scoring_rows
from secateur.tasks.data.samples import list_stage_samples, list_target_samples, read_stage_samples
from secateur.tasks.plan import Plan
from secateur.tasks.reporting.dry_run import SELECTION_COST, estimate_run
from secateur.tasks.results.audit_results import read_audit_frame
from secateur.tasks.results.training_results import SELECTION, read_selected_rows
from secateur.tasks.results.valuation_results import read_scores
from secateur.tasks.run import Run
from secateur.tasks.training.fit_basis import fit_basis
from secateur.tasks.training.loop import TrainingLoop, eval_mode
from secateur.tasks.training.online_selection import OnlineSelector, TargetGroups
from secateur.tasks.training.train import train_stage
from secateur.tasks.valuation.dynamics import read_segment
from tests.tasks.small import curate_small, make_data, sample, small_plan
from tests.tasks.valuation.test_replay import ADAMW, REPLAYED, loss_without

SOME = {"kind": "coordinates", "numbers": 60, "fit_steps": 1}
ALL = SOME | {"numbers": None}
SGD = {"kind": "sgd", "lr": 0.2, "momentum": 0.5}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("select")
    make_data(folder)
    return folder


def stage(method: str = "greats", samples: int = 10, **changes: Any) -> dict[str, Any]:
    """A stage that selects in an early and in a late window, and not between them."""
    select = {"method": method, "candidates": 3, "samples": samples}
    early = {"start": 0, "stop": 4, "unit": "steps", "select": select}
    late = {"start": 7, "stop": 10, "unit": "steps", "select": select}
    return {"steps": 10, "batch_size": 20, "windows": [early, late], **changes}


def plan_of(folder: Path, name: str, **changes: Any) -> Plan:
    settings = {"dtype": "float64", "optimizer": SGD, "basis": SOME, "segment_steps": 4, **changes}
    return small_plan(folder, run=name, **({"stages": [stage()]} | settings))


def train_only(plan: Plan) -> Run:
    """Train the first stage of a run, and do nothing else."""
    run = Run.start(plan)
    list_stage_samples(run, 0)
    fit_basis(run)
    train_stage(run, 0)
    return run


def read_selection(run: Run) -> pl.DataFrame:
    """The decisions of online selection in the first stage."""
    segments = run.folder.stage(0).segments()
    return pl.concat(
        [read_frame(one, SELECTION) for one in segments if "selection" in one.manifest.facts]
    )


def gradients(loop: TrainingLoop, rows: Tensor, samples: Any = None) -> Tensor:
    """Each sample's own gradient by autograd, in the coefficients of the basis."""
    basis = loop.run.basis(loop.run.bindings(loop.model))
    projected = []
    with eval_mode(loop.model):
        for row in rows:
            loop.model.zero_grad()
            loop.task.losses(loop.model, loop.batch(row[None], samples)).sum().backward()
            named = loop.model.named_parameters()
            projected.append(
                basis.project_tensors({n: p.grad for n, p in named if p.grad is not None})
            )
    return torch.stack(projected)


def choose_by_hand(
    run: Run, method: str, step: int, weigh_by_size: bool
) -> tuple[list[int], list[float]]:
    """Choose one sample at a time, from the checkpoint before the step.

    Returns:
        The rows in the order of their choice, and the score of every candidate.
    """
    loop = TrainingLoop(run, 0, read_stage_samples(run, 0))
    loop.load_state(read_checkpoint(run.folder.stage(0).segment(step - 1)))
    rows = loop.schedule.candidates(step, 3)
    weights = torch.full((60,), 1 / 20, dtype=torch.float64)
    if weigh_by_size:
        tokens = loop.sizes(loop.batch(rows), 60)
        weights = tokens / tokens.sum() * 3
    # Momentum changes nothing, because the buffer takes the whole gradient.
    updates = -0.2 * weights[:, None] * gradients(loop, rows)
    target = list_target_samples(run, "clean")
    group = torch.cat([part for part, _ in TargetGroups(loop, "clean", 10).group(step)])
    query = gradients(loop, group, target).mean(0)
    picks: list[int] = []
    for _ in range(20):
        shared = torch.zeros_like(query)
        if picks and method == "greats":
            shared = updates[picks].sum(0)
        gains = [
            float("-inf") if i in picks else -float(update @ (query + shared))
            for i, update in enumerate(updates)
        ]
        picks.append(gains.index(max(gains)))
    return rows[picks].tolist(), (-updates @ query).tolist()


@pytest.mark.parametrize(
    ("method", "reduction", "parts"), [("grad_align", "mean", 1), ("greats", "token_mean", 4)]
)
def test_the_choice_equals_that_of_explicit_gradients(
    folder: Path, method: str, reduction: str, parts: int
) -> None:
    """For any number of micro-batches. Candidates are scored without dropout."""
    plan = plan_of(
        folder,
        f"hand-{method}",
        stages=[stage(method, accumulate=parts)],
        segment_steps=1,
        basis=ALL,
        task={"factory": "tests.tasks.digits:Digits", "reduction": reduction},
    )
    run = train_only(plan)
    for step in (1, 3, 8):
        rows, scores = choose_by_hand(run, method, step, reduction == "token_mean")
        frame = read_selection(run).filter(pl.col("step") == step)
        assert frame.filter("chosen").sort("rank")["sample"].to_list() == rows
        assert frame["score"].to_list() == pytest.approx(scores, rel=1e-9)
        assert read_segment(run.folder.stage(0).segment(step)).samples.tolist() == rows


def test_the_ledger_holds_every_decision(folder: Path) -> None:
    run = curate_small(plan_of(folder, "ledger", stages=[stage(), {"steps": 3, "batch_size": 20}]))
    frame = read_selection(run)
    schedule = BatchSchedule(run.plan, 0, 140)
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
    samples = torch.cat([read_segment(s).samples for s in run.folder.stage(0).segments()]).view(
        10, 20
    )
    for step in range(10):
        chosen = frame.filter((pl.col("step") == step) & pl.col("chosen")).sort("rank")
        expected = chosen["sample"].to_list() or schedule.batch(step).tolist()
        assert samples[step].tolist() == expected
    result = train_stage(run, 0)
    assert (result.candidates, result.chosen) == (7 * 60, 7 * 20)
    assert train_stage(run, 1).candidates == 0
    assert read_selected_rows(run.folder.stage(1)) == {}


def test_the_random_method_depends_on_the_seed_only(folder: Path) -> None:
    run = train_only(plan_of(folder, "random", stages=[stage("random")]))
    again = train_only(plan_of(folder, "random", root=f"{folder}/again", stages=[stage("random")]))
    assert read_selection(run).equals(read_selection(again))
    assert read_selection(run)["score"].null_count() == len(read_selection(run))
    other = train_only(
        plan_of(folder, "random", root=f"{folder}/seed", seed=1, stages=[stage("random")])
    )
    assert not read_selection(run).equals(read_selection(other))


@pytest.mark.parametrize("optimizer", [SGD, ADAMW])
def test_replay_is_the_derivative_of_training_on_the_chosen_samples(
    folder: Path, optimizer: dict[str, Any]
) -> None:
    """The expected values are of training again with the same choice.

    Replay itself compares its end with the checkpoints.
    """
    plan = plan_of(
        folder,
        f"replay-{optimizer['kind']}",
        optimizer=optimizer,
        score=REPLAYED,
        replay={"step": 1e-5},
        stages=[stage(accumulate=2)],
        basis={"kind": "coordinates", "numbers": 100},
    )
    run = curate_small(plan)
    scores = read_scores(run, 0)
    for use in (0, 45, 79, 139):
        step, row = int(scores["step"][use]), int(scores["sample"][use])
        up, down = (loss_without(run, step, row, sign * 1e-4) for sign in (1, -1))
        assert scores["score_clean"][use] == pytest.approx((up - down) / 2e-4, rel=1e-3, abs=1e-9)


def test_embeddings_with_the_hessian_agree_with_replay(folder: Path) -> None:
    common: dict[str, Any] = {
        "optimizer": ADAMW,
        "basis": ALL,
        "replay": {"step": 1e-5},
        "curvature": {"kind": "hessian", "coupling": "full", "every": 1},
        "model": {"factory": "tests.tasks.digits:network", "args": {"width": 4}},
    }
    embedded = curate_small(
        plan_of(folder, "he", score=REPLAYED | {"estimate": "embedding"}, **common)
    )
    exact = curate_small(plan_of(folder, "hr", score=REPLAYED, **common))
    found, expected = (read_scores(run, 0)["score_clean"].to_numpy() for run in (embedded, exact))
    assert found == pytest.approx(expected, rel=1e-3, abs=1e-7)


def test_a_hessian_of_coming_steps_reads_the_steps_that_are_known(folder: Path) -> None:
    run = curate_small(
        plan_of(folder, "ahead", curvature={"kind": "hessian", "every": 4, "coupling": "full"})
    )
    assert read_segment(run.folder.stage(0).segment(1)).hessian_steps.tolist() == [4]
    assert read_scores(run, 0)["score_clean"].is_finite().all()


def test_an_audit_leaves_out_exactly_one_use(folder: Path) -> None:
    score = REPLAYED | {"estimate": "embedding"}
    run = curate_small(plan_of(folder, "audit", score=score, audit={"removals": 6, "stages": [0]}))
    base = loss_without(run, 0, -1, 0.0)
    for step, row, truth in read_audit_frame(run, 0).select("step", "sample", "truth").iter_rows():
        assert truth == pytest.approx(loss_without(run, step, row, 1.0) - base, rel=1e-6, abs=1e-10)
        assert truth != 0


@pytest.mark.parametrize("step", [2, 9])
def test_an_interrupted_stage_continues_to_the_same_bytes(
    folder: Path, step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train_only(plan_of(folder, "whole"))
    plan = plan_of(folder, "whole", root=f"{folder}/resumed{step}")
    choose = OnlineSelector.choose

    def interrupt(selector: OnlineSelector, number: int) -> None:
        choose(selector, number)
        if number == step:
            raise KeyboardInterrupt

    monkeypatch.setattr(OnlineSelector, "choose", interrupt)
    with pytest.raises(KeyboardInterrupt):
        train_only(plan)
    monkeypatch.setattr(OnlineSelector, "choose", choose)
    resumed = train_only(plan)
    for one, other in zip(
        whole.folder.stage(0).segments(), resumed.folder.stage(0).segments(), strict=True
    ):
        assert one.manifest.files == other.manifest.files


def test_the_basis_is_fitted_without_selection(folder: Path) -> None:
    basis = {"kind": "kronecker", "method": "pca", "rank": 4, "fit_steps": 3}
    plain = train_only(
        plan_of(folder, "plain", basis=basis, stages=[{"steps": 10, "batch_size": 20}])
    )
    chosen = train_only(plan_of(folder, "chosen", basis=basis))
    assert plain.folder.basis.manifest.files == chosen.folder.basis.manifest.files
    one, other = (
        read_segment(run.folder.stage(0).segment(0)).samples.tolist() for run in (plain, chosen)
    )
    assert one != other


def test_held_out_samples_do_not_select(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: set[int] = set()
    read_batch = TrainingLoop.batch

    def record(loop: TrainingLoop, rows: Tensor, samples: Any = None) -> Any:
        read.update(rows.tolist() if samples is not None else [])
        return read_batch(loop, rows, samples)

    monkeypatch.setattr(TrainingLoop, "batch", record)
    run = Run.start(plan_of(folder, "halves", trust={"trial": {}}))
    loop = TrainingLoop(run, 0, read_stage_samples(train_only(plan_of(folder, "other")), 0))
    read.clear()
    target = TargetGroups(loop, "clean", 5)
    groups = [torch.cat([rows for rows, _ in target.group(step)]).tolist() for step in range(6)]
    scoring = scoring_rows(run.plan, "clean", 24).tolist()
    assert sorted(row for group in groups[:3] for row in group) == scoring
    assert groups[:3] == groups[3:]
    assert read == set(scoring)


@given(st.integers(60, 200), st.integers(2, 4), st.integers(1, 15))
def test_every_sample_is_a_candidate_once_per_epoch(samples: int, times: int, batch: int) -> None:
    plan = small_plan(Path("/"), stages=[{"steps": 9, "batch_size": batch}])
    schedule = BatchSchedule(plan, 0, samples)
    steps = samples // (times * batch)
    epoch = torch.cat([schedule.candidates(step, times) for step in range(steps)])
    assert len(epoch) == steps * times * batch == len(set(epoch.tolist()))
    next_epoch = schedule.candidates(steps, times)
    assert schedule.candidates(0, times).tolist() == epoch[: times * batch].tolist()
    assert len(set(next_epoch.tolist())) == times * batch


def test_more_candidates_than_samples_are_refused(folder: Path) -> None:
    plan = plan_of(folder, "many", stages=[stage(batch_size=60)])
    for start in (estimate_run, curate_small):
        with pytest.raises(
            PlanError, match="among 180 candidates per step and the stage has 140 samples; lower"
        ):
            start(plan)


def test_a_target_that_is_not_in_the_plan_is_refused(folder: Path) -> None:
    windows = [{"select": {"target": "other"}}]
    with pytest.raises(ValidationError, match=r"select\.target other is none of the targets clean"):
        plan_of(folder, "target", stages=[stage(windows=windows)])


def test_a_candidate_whose_loss_is_not_finite_is_named(folder: Path, tmp_path: Path) -> None:
    make_data(tmp_path, [sample(501, cls=b"nan")])
    with pytest.raises(
        PlanError, match=r"the loss of sample digit-0501 is nan at step \d of stage 0"
    ):
        train_only(plan_of(tmp_path, "nan"))


def test_a_target_whose_loss_is_not_finite_is_named(folder: Path, tmp_path: Path) -> None:
    make_data(tmp_path, [sample(501, cls=b"nan")])
    bad = {"clean": {"shards": f"{tmp_path}/train-1.tar"}}
    with pytest.raises(PlanError, match="the loss of target clean is not finite at step"):
        curate_small(plan_of(folder, "nantarget", targets=bad, stages=[stage(samples=100)]))


def test_the_dry_run_estimates_the_cost_of_selection(folder: Path) -> None:
    found = estimate_run(
        plan_of(folder, "dry", stages=[stage(), {"steps": 4, "batch_size": 20}])
    ).selections
    assert list(found) == [0]
    assert (found[0].steps, found[0].judged) == (7, 7 * (60 + 10))
    assert found[0].cost == pytest.approx(SELECTION_COST * 490 / 200)
    random = estimate_run(plan_of(folder, "dry", stages=[stage("random")])).selections[0]
    assert (random.judged, random.cost) == (0, 0.0)

"""How far a stage's answers agree with replay, against retraining by the tests' own loop."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from scipy.stats import spearmanr
from torch import Tensor

from secateur.errors import PlanError
from secateur.storage.integrity import find_stray_files, verify_folder
from secateur.storage.outputs import Output
from secateur.tasks.analysis import agreement
from secateur.tasks.analysis.agreement import share_found, write_agreement
from secateur.tasks.analysis.question_replays import remaining_questions, replay_drawn
from secateur.tasks.data.samples import list_target_samples, read_stage_samples
from secateur.tasks.reporting.dry_run import estimate_run
from secateur.tasks.reporting.html_report import HTML, write_report
from secateur.tasks.results.agreement_results import read_agreement, read_agreement_frame
from secateur.tasks.results.pruning_results import read_decisions
from secateur.tasks.results.valuation_results import read_directions, read_scores
from secateur.tasks.run import Run
from secateur.tasks.training.loop import MicroBatch, TrainingLoop, eval_mode
from secateur.tasks.training.segments import restore_segment_start
from secateur.tasks.valuation import replay_question
from secateur.tasks.valuation.drawn_questions import draw_questions
from secateur.tasks.valuation.query import find_influential
from secateur.tasks.valuation.replay import walk_back
from tests.tasks.small import curate_small, interrupt_replay, make_data, small_plan
from tests.tasks.valuation.test_replay import ADAMW

ONE_STAGE = [{"steps": 6, "batch_size": 10}]
EFFECT = {"estimate": "embedding", "horizon": "stage", "aggregate": "mean"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("agreement")
    make_data(folder)
    return folder


def asking_plan(folder: Path, name: str, **changes: Any) -> Any:
    """A plan of one short stage in float64 that asks three questions about two targets."""
    targets = {"clean": "target-0", "other": "train-1"}
    settings = {
        "optimizer": ADAMW,
        "basis": {"kind": "coordinates", "numbers": 60},
        "components": 12,
        "stages": ONE_STAGE,
        "segment_steps": 3,
        "dtype": "float64",
        "replay": {"step": 1e-5},
        "targets": {key: {"shards": f"{folder}/{name}.tar"} for key, name in targets.items()},
        "trust": {"questions": 3},
        **changes,
    }
    return small_plan(folder, run=name, **settings)


@pytest.fixture(scope="module")
def run(folder: Path) -> Run:
    return curate_small(asking_plan(folder, "asked"))


def question_losses(run: Run, loop: TrainingLoop) -> Tensor:
    """The loss of each question's sample."""
    losses = []
    with eval_mode(loop.model):
        for target, key in read_agreement_frame(run, 0).select("target", "key").iter_rows():
            samples = list_target_samples(run, target)
            rows = torch.tensor([samples.frame["key"].to_list().index(key)])
            losses.append(loop.task.losses(loop.model, loop.batch(rows, samples)))
    return torch.cat(losses)


def retrained_effects(run: Run) -> np.ndarray:
    """The derivative of each question's loss by the weight of each use, `questions uses`."""
    loop = TrainingLoop(run, 0, read_stage_samples(run, 0))
    micro_batches = loop.micro_batches
    changed = (-1, -1, 0.0)  # step, row, share of the weight that is taken away

    def change_weight(number: int) -> list[MicroBatch]:
        step, row, share = changed
        parts = micro_batches(number)
        if number != step:
            return parts
        return [
            replace(p, weights=torch.where(p.rows == row, (1 - share) * p.weights, p.weights))
            for p in parts
        ]

    loop.micro_batches = change_weight  # type: ignore[method-assign, assignment]
    effects = []
    for step, row in read_scores(run, 0).select("step", "sample").iter_rows():
        losses = []
        for share in (1e-4, -1e-4):
            changed = (step, row, share)
            restore_segment_start(run, loop, 0, 0)
            for number in range(loop.schedule.steps):
                loop.step(number)
            losses.append(question_losses(run, loop).detach().numpy())
        effects.append((losses[0] - losses[1]) / 2e-4)
    return np.array(effects).T


def test_the_agreement_is_that_of_answers_with_retraining(run: Run) -> None:
    """Each sample is used once, so that a query about all of them lists every use."""
    uses = read_scores(run, 0).select("key", "step")
    assert uses["key"].is_unique().all()
    frame = read_agreement_frame(run, 0)
    assert frame["target"].to_list() == ["clean", "other", "clean"]
    assert frame["key"].is_unique().all()
    for row, truth in zip(frame.iter_rows(named=True), retrained_effects(run), strict=True):
        helpful = set(np.argsort(-truth)[:50].tolist())
        for estimate in ("embedding", "pull_back", "replay"):
            hits = find_influential(run, sample=row["key"], top=60, estimate=estimate).hits
            found = {hit.key: hit.score for hit in hits}
            scores = np.array([found[key] for key in uses["key"]])
            expected = float(spearmanr(scores, truth).statistic)
            if estimate == "replay":
                assert expected > 0.999
                continue
            assert -0.9 < expected < 0.99
            assert row[f"spearman_{estimate}"] == pytest.approx(expected, abs=0.003)
            best = set(np.argsort(-scores)[:50].tolist())
            assert row[f"found_{estimate}"] == pytest.approx(len(helpful & best) / 50, abs=0.03)
    assert frame["spearman_embedding"].to_list() != frame["spearman_pull_back"].to_list()


def test_the_share_of_the_gradient_is_that_of_the_chosen_directions(run: Run) -> None:
    loop = TrainingLoop(run, 0, read_stage_samples(run, 0))
    restore_segment_start(run, loop, 0, 2)
    basis = run.basis(run.bindings(loop.model))
    parameters = dict(loop.model.named_parameters())
    lifted = [basis.lift_to_tensors(one) for one in read_directions(run, 0).double().T]
    assert len(lifted) == 12

    def share(loss: Tensor) -> float:
        gradients = torch.autograd.grad(loss, list(parameters.values()), retain_graph=True)
        named = dict(zip(parameters, gradients, strict=True))
        along = [sum(float((named[n] * part).sum()) for n, part in one.items()) for one in lifted]
        return sum(a**2 for a in along) / sum(float((g**2).sum()) for g in gradients)

    expected = [share(loss) for loss in question_losses(run, loop)]
    assert read_agreement_frame(run, 0)["held"].to_list() == pytest.approx(expected, rel=1e-9)
    samples = list_target_samples(run, "clean")
    with eval_mode(loop.model):
        batch = loop.batch(torch.arange(len(samples)), samples)
        mean = loop.task.losses(loop.model, batch).mean()
    assert find_influential(run, "clean").held == pytest.approx(share(mean), rel=1e-9)
    key = read_agreement_frame(run, 0)["key"][0]
    assert find_influential(run, sample=key).held == pytest.approx(expected[0], rel=1e-9)
    assert find_influential(run, sample=key, estimate="replay").held is None


def test_answers_and_reports_say_what_was_measured(run: Run) -> None:
    frame = read_agreement_frame(run, 0)
    result = read_agreement(run, 0)
    for estimate in ("embedding", "pull_back"):
        correlations = frame[f"spearman_{estimate}"].to_list()
        middle, lowest = median(correlations), min(correlations)
        answer = find_influential(run, "clean", estimate=estimate)
        assert answer.agreement == {0: result}
        assert result.estimates[estimate].spearman == pytest.approx(middle)
        assert result.estimates[estimate].lowest == lowest
        first, second = answer.trust()
        assert f"by {estimate} about its own end agree with replay to {middle:.2f}" in first
        assert f"the lowest {lowest:.2f}" in first
        assert "50 most helpful uses are among their best 50 of 60" in first
        assert f"holds {answer.held:.0%} of this question's squared gradient" in second
    write_report(run, 0)
    page = run.folder.stage(0).report.read(HTML).decode()
    assert f"<td>{middle:.2f} ({lowest:.2f})</td>" in page


def test_a_stage_that_was_not_measured_is_named_in_one_line(folder: Path) -> None:
    run = curate_small(asking_plan(folder, "unasked", trust={}))
    sentences = find_influential(run, "clean").trust()
    assert [line for line in sentences if "was not measured" in line] == sentences[:1]
    assert not run.folder.stage(0).agreement.committed


def test_uses_are_found_among_the_best() -> None:
    truth = torch.tensor([5.0, 4, 3, 2, 1, 0])
    scores = torch.tensor([0.0, 9, 8, 1, 7, 6])
    assert share_found(scores, truth, 2, 2) == 0.5
    assert share_found(scores, truth, 3, 4) == pytest.approx(2 / 3)


def test_an_interrupted_comparison_continues(
    run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is interrupted in the second segment, and again before the replays are removed."""
    plan = asking_plan(folder, "resumed")
    steps = interrupt_replay(monkeypatch, at=11)
    with pytest.raises(KeyboardInterrupt):
        curate_small(plan)
    resumed = Run.of_plan(plan)
    assert remaining_questions(resumed, 0, 3) == [0, 1, 2]
    remove = Output.remove

    def stop(output: Output) -> None:
        if "/replay/question" in output.root.url:
            raise KeyboardInterrupt
        remove(output)

    monkeypatch.setattr(Output, "remove", stop)
    with pytest.raises(KeyboardInterrupt):
        curate_small(plan)
    # The last segment, of three steps for three questions, is not repeated.
    assert len(steps) == 11 + 9
    assert remaining_questions(resumed, 0, 3) == []
    assert resumed.folder.stage(0).replay("question-0002", 0).committed
    monkeypatch.setattr(Output, "remove", remove)
    curate_small(plan)
    assert len(steps) == 11 + 9
    assert read_agreement_frame(resumed, 0).equals(read_agreement_frame(run, 0))
    for one in (run, resumed):
        assert not [name for name in one.folder.root.files() if "/replay/" in name]
        assert list(verify_folder(one.folder.root)) == []
        assert find_stray_files(one.folder.root) == []


def test_a_run_may_be_asked_on_demand_in_several_walks(run: Run, folder: Path) -> None:
    asked = curate_small(asking_plan(folder, "demanded", trust={}))
    replay_drawn(asked, 0, 4, [1, 3])  # of an audit with four questions that was given up
    assert remaining_questions(asked, 0, 3) == [0, 2]
    replay_drawn(asked, 0, 3, [0, 2])
    assert write_agreement(asked, 0, 3) == read_agreement(run, 0)
    assert read_agreement_frame(asked, 0).equals(read_agreement_frame(run, 0))
    assert find_influential(asked, "clean").agreement == {0: read_agreement(run, 0)}
    with pytest.raises(PlanError, match="was asked 3 questions before, and is to be asked 5 now"):
        write_agreement(asked, 0, 5)
    assert not [name for name in asked.folder.root.files() if "/replay/" in name]


def test_questions_are_drawn_by_the_seed(run: Run, folder: Path) -> None:
    """As many as the targets have samples are each sample once."""
    every = Run.of_plan(asking_plan(folder, "every", trust={"questions": 94}))
    drawn = [(one.target, one.key) for one in draw_questions(every, 94)]
    assert len(set(drawn)) == 94
    frame = read_agreement_frame(run, 0).select("target", "key")
    assert drawn[:3] == list(frame.iter_rows())
    other = Run.of_plan(asking_plan(folder, "every", trust={"questions": 94}, seed=1))
    assert [(one.target, one.key) for one in draw_questions(other, 94)] != drawn


@pytest.mark.parametrize("by", ["embedding", "replay", "contribution"])
def test_a_stage_is_pruned_by_embeddings_only_if_they_agree(folder: Path, by: str) -> None:
    """Scores that are not read from embeddings are not concerned."""
    stages = [{"steps": 6, "batch_size": 10, "prune": {"policy": "top", "keep": 0.5}}]
    score = {"contribution": {}, "replay": EFFECT | {"estimate": "replay"}}.get(by, EFFECT)
    kept = {}
    for least in (-1.0, 1.0):
        trust = {"questions": 2, "min_agreement": least}
        name = f"gate-{by}-{least:g}"
        run = curate_small(asking_plan(folder, name, score=score, stages=stages, trust=trust))
        decisions = read_decisions(run, 0)
        kept[least] = int(decisions["keep"].sum())
        if least == 1 and by == "embedding":
            reason = decisions.filter(pl.col("reason").str.contains("agree"))["reason"][0]
            assert "the embeddings' answers agree with replay to 0." in reason
            assert "under the plan's 1" in reason
    assert kept == {-1.0: 110, 1.0: 140 if by == "embedding" else 110}


def test_a_demand_may_end_the_run(folder: Path) -> None:
    trust = {"questions": 2, "min_agreement": 1.0, "otherwise": "fail"}
    stages = [{"steps": 6, "batch_size": 10, "prune": {"policy": "top", "keep": 0.5}}]
    plan = asking_plan(folder, "fail", score=EFFECT, stages=stages, trust=trust)
    with pytest.raises(PlanError, match="is not pruned: the embeddings' answers agree with replay"):
        curate_small(plan)
    assert not (folder / "runs/fail/stages/00/prune").exists()


def test_answers_below_the_demand_are_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = asking_plan(folder, "demand", trust={"min_agreement": 0.99})
    assert plan.trust.asked == 8
    run = curate_small(plan)
    assert len(read_agreement_frame(run, 0)) == 8
    for estimate in ("embedding", "pull_back"):
        sentence = (
            rf"answers by {estimate} in stage 0 .* agree with replay to 0\.\d\d, and the plan "
            rf"demands 0\.99; ask with `--estimate replay`"
        )
        with pytest.raises(PlanError, match=sentence):
            find_influential(run, "clean", estimate=estimate)
    assert find_influential(run, "clean", estimate="replay").hits
    run.folder.stage(0).agreement.remove()
    with pytest.raises(PlanError, match=r"that of stage 0 .* is not measured yet; `secateur run`"):
        find_influential(Run.open(run.url), "clean")


def test_what_cannot_be_compared_is_refused_before_training(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for changes in ({"dtype": "bfloat16"}, {"dtype": "float32", "autocast": "bfloat16"}):
        with pytest.raises(ValueError, match="differences that half precision cannot hold"):
            asking_plan(folder, "half", **changes)
        half = Run.of_plan(asking_plan(folder, "half", trust={}, **changes))
        with pytest.raises(PlanError, match="was trained in half precision"):
            replay_drawn(half, 0, 2)
    monkeypatch.setattr(TrainingLoop, "step", None)
    plan = asking_plan(folder, "many", trust={"questions": 95})
    sentence = r"95 questions are to be asked \(trust\.questions\) and the targets have 94 samples"
    with pytest.raises(PlanError, match=sentence):
        curate_small(plan)
    with pytest.raises(PlanError, match=sentence):
        estimate_run(plan)


def test_replay_goes_no_further_back_than_the_stage_asked_for(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stages = [{"steps": 3, "batch_size": 10}, {"steps": 3, "batch_size": 10}]
    run = curate_small(asking_plan(folder, "two", stages=stages, trust={}))
    both = find_influential(run, "clean", top=100, estimate="replay").hits
    walked = []

    def walk(run: Run, loop: TrainingLoop, *others: Any) -> Any:
        walked.append(loop.schedule.number)
        return walk_back(run, loop, *others)

    monkeypatch.setattr(replay_question, "walk_back", walk)
    late = find_influential(run, "clean", top=100, stage=1, estimate="replay").hits
    assert walked == [1]
    scores = {(hit.key, hit.stage): hit.score for hit in both}
    shared = [hit for hit in late if (hit.key, 1) in scores]
    assert shared
    assert all(scores[hit.key, 1] == hit.score for hit in shared)


def test_questions_count_in_what_the_plan_costs(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adjoints: list[int] = []
    compare = agreement._compare

    def measure(run: Run, stage: int, *others: Any) -> Any:
        sizes = run.folder.stage(stage).root.sizes()
        adjoints.append(sum(size for name, size in sizes.items() if "adjoint" in name))
        return compare(run, stage, *others)

    monkeypatch.setattr(agreement, "_compare", measure)
    wide = {"factory": "tests.tasks.digits:network", "args": {"width": 200}}
    few, more = (
        asking_plan(folder, f"cost{n}", model=wide, trust={"questions": n}) for n in (1, 4)
    )
    without = estimate_run(asking_plan(folder, "cost0", model=wide, trust={}))
    one, four = estimate_run(few), estimate_run(more)
    # The figures of docs/fidelity.md: replay of one question, and of each further one.
    assert (without.questions, one.questions) == ({}, {0: 3.5})
    assert four.questions == {0: pytest.approx(3.5 + 3 * 2.2)}
    curate_small(more)
    # Of two adjoints at one time, the later one is removed when the earlier is written.
    assert adjoints == [pytest.approx(four.stages[0].question_bytes / 2, rel=0.02)]
    assert without.stages[0].question_bytes == 0
    replays = [{part.part: part for part in e.memory}.get("replay") for e in (without, one, four)]
    assert replays[0] is None
    assert replays[1] is not None
    assert replays[2] is not None
    adjoint = 3 * 8 * four.parameters
    assert replays[2].peak - replays[1].peak == pytest.approx(3 * adjoint, rel=0.01)

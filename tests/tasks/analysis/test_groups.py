"""Values of groups, compared with derivatives of training and with retraining without them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from torch import Tensor

from secateur.errors import PlanError
from secateur.flows.stage import train_stage
from secateur.tasks.analysis.groups import SampleGroup, value_groups
from secateur.tasks.data.held_out import scoring_rows
from secateur.tasks.data.samples import list_target_samples, read_stage_samples
from secateur.tasks.results.pruning_results import read_decisions
from secateur.tasks.results.valuation_results import read_scores
from secateur.tasks.run import Run
from secateur.tasks.training.loop import MicroBatch, TrainingLoop, eval_mode
from secateur.tasks.training.segments import restore_segment_start
from tests.tasks.small import (
    INLINE,
    curate_small,
    make_data,
    sample,
    score_small,
    small_plan,
)

COPIED = (3, 20)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("groups")
    copies = [{**sample(number), "__key__": f"copy-{number}"} for number in COPIED]
    make_data(folder, copies)
    return folder


@pytest.fixture(scope="module")
def run(folder: Path) -> Run:
    """Two windows in stage 0, dropout, and half of the target held out."""
    target = {"shards": f"{folder}/target-0.tar", "judging": 0.5}
    plan = small_plan(
        folder,
        dtype="float64",
        targets={"clean": target},
        optimizer={"kind": "sgd", "lr": 0.2, "momentum": 0.5},
        replay={"step": 1e-5},
    )
    return curate_small(plan)


def labels(run: Run, stage: int = 0) -> list[str]:
    samples = read_stage_samples(run, stage)
    return [s["cls"].decode() for s in samples.read(range(len(samples)))]


def loss_with(run: Run, is_member: Callable[[Tensor], Tensor], factor: float) -> float:
    """Train stage 0 again with the weights of the members' recorded uses multiplied.

    Returns the mean loss of the target's scoring half.
    """
    loop = TrainingLoop(run, 0, read_stage_samples(run, 0))
    restore_segment_start(run, loop, 0, 0)
    micro_batches = loop.micro_batches
    recorded = {step for window in loop.schedule.windows() for step in window}

    def change_weights(step: int) -> list[MicroBatch]:
        parts = micro_batches(step)
        if step not in recorded:
            return parts
        return [
            replace(p, weights=torch.where(is_member(p.rows), factor * p.weights, p.weights))
            for p in parts
        ]

    loop.micro_batches = change_weights  # type: ignore[method-assign]
    for step in range(loop.schedule.steps):
        loop.step(step)
    samples = list_target_samples(run, "clean")
    rows = scoring_rows(run.plan, "clean", len(samples))
    with eval_mode(loop.model), torch.no_grad():
        return float(loop.task.losses(loop.model, loop.batch(rows, samples)).mean())


def by_name(groups: list[SampleGroup]) -> dict[str, SampleGroup]:
    return {group.group: group for group in groups}


def test_a_sum_is_a_derivative_and_a_removal_is_retraining(run: Run) -> None:
    found = value_groups(run, "cls", 0, estimate="replay", top=20, removals=2)
    assert [group.rank for group in found] == list(range(1, 11))
    assert [group.score for group in found] == sorted((g.score for g in found), reverse=True)
    known = labels(run)
    full = loss_with(run, lambda rows: rows < 0, 1)
    for group in found[:2]:
        members = torch.tensor([n for n, label in enumerate(known) if label == group.group])
        assert group.samples == len(members)

        def is_member(rows: Tensor, members: Tensor = members) -> Tensor:
            return torch.isin(rows, members)

        less = loss_with(run, is_member, 1 - 1e-4)
        more = loss_with(run, is_member, 1 + 1e-4)
        assert group.score == pytest.approx((less - more) / 2e-4, rel=1e-3)
        assert group.removal == pytest.approx(loss_with(run, is_member, 0) - full, rel=1e-9)
    assert [group.removal for group in found[2:]] == [None] * 8


def test_removals_are_stored(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    first = value_groups(run, "json:parity", 0, removals=1)
    monkeypatch.setattr(TrainingLoop, "step", None)
    assert value_groups(run, "json:parity", 0, removals=1) == first


def test_embeddings_pull_back_and_uses_agree(run: Run) -> None:
    """Sums of the same scores: of the stored embeddings, and by a scan of the ledgers."""
    embedded = by_name(value_groups(run, "cls", 0, top=20))
    pulled = by_name(value_groups(run, "cls", 0, top=20, estimate="pull_back"))
    assert embedded.keys() == pulled.keys()
    for name, group in embedded.items():
        assert group.score == pytest.approx(pulled[name].score, rel=1e-6)
        assert (group.samples, group.uses) == (pulled[name].samples, pulled[name].uses)


def test_counts_are_those_of_scores_and_decisions(run: Run) -> None:
    known = pl.DataFrame({"group": labels(run)}).with_row_index("sample")
    uses = read_scores(run, 0).join(known, "sample")
    decisions = read_decisions(run, 0).join(known, "sample")
    for group in value_groups(run, "cls", 0, top=20):
        own = uses.filter(pl.col("group") == group.group)
        decided = decisions.filter(pl.col("group") == group.group)
        assert group.uses == len(own)
        assert group.mean == pytest.approx(group.score / own["sample"].n_unique())
        assert (group.kept, group.dropped) == (decided["keep"].sum(), (~decided["keep"]).sum())
        assert group.samples == len(decided)
    unpruned = value_groups(run, "cls")
    assert [(group.kept, group.dropped) for group in unpruned] == [(None, None)] * len(unpruned)


def test_shards_are_groups(run: Run) -> None:
    found = value_groups(run, "shard", 0, harmful=True)
    assert {group.group for group in found} == set(read_stage_samples(run, 0).urls)
    assert found[0].score < found[1].score


def test_copies_are_a_group_of_their_members(run: Run) -> None:
    found = by_name(value_groups(run, "duplicates", 0, estimate="replay"))
    for number in COPIED:
        group = found[f"digit-{number:04d}"]
        assert set(group.members) <= {f"digit-{number:04d}", f"copy-{number}"}
        assert group.samples == 2
        assert group.score == pytest.approx(sum(group.members.values()))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (
            {"by": "nothing"},
            r"digit-\d+ has no nothing to group by; `by` names a member \(\w+, ",
        ),
        ({"by": "json:nothing"}, "has no json:nothing to group by"),
        ({"by": "cls", "stage": 7}, "stage 7 of .* is not indexed; the indexed stages are 0, 1"),
        ({"by": "cls", "target": "x"}, "has no target x; it has clean"),
        ({"by": "cls", "estimate": "x"}, "--estimate is x; give one of embedding, pull_back"),
        ({"by": "cls", "top": 0}, "--top is 0; ask for at least one group"),
        ({"by": "cls", "top": 2, "removals": 3}, "--removals is 3; give a number from 0 to the 2"),
        ({"by": "cls", "similarity": 0.9}, "--similarity is for --by duplicates"),
        ({"by": "duplicates", "similarity": 2}, "--similarity is 2; give a number between 0 and 1"),
    ],
)
def test_what_is_not_possible_is_one_sentence(
    run: Run, arguments: dict[str, Any], expected: str
) -> None:
    with pytest.raises(PlanError, match=expected):
        value_groups(run, **arguments)


def test_a_stage_without_checkpoints_cannot_lose_a_group(folder: Path) -> None:
    plan = small_plan(folder, run="ends", checkpoints={"keep": "stage_ends"})
    run = Run.start(plan)
    train_stage(INLINE, run.url, 0)
    score_small(run, 0)
    with pytest.raises(PlanError, match=r"checkpoints within stage 0 .* are removed already"):
        value_groups(run, "cls", removals=1)

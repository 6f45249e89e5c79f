"""Arms, what they share, their intervals and the verdict; the runs themselves are in tests/flows/test_compare.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from secateur.errors import PlanError
from secateur.storage.folder import Folder
from secateur.storage.outputs import Output, copy_outputs
from secateur.tasks.comparison.arm_runs import comparable_plan, held_out_targets
from secateur.tasks.comparison.arms import ALWAYS, PLAN, arm_plan, check_arms, read_arms
from secateur.tasks.comparison.comparison_report import ArmResult, summarize_verdict
from secateur.tasks.comparison.figures import Interval, summarize_figures
from tests.tasks.small import make_data, small_plan

NOWHERE = Path("/nowhere")
TRIAL = {"trial": {"steps": 3}}


def test_arms_are_read_from_options_and_a_file(tmp_path: Path) -> None:
    path = tmp_path / "arms.yaml"
    path.write_text("warm: {temperature: 0.5}\nhard: {policy: el2n, prefer: highest}\n")
    options = [
        "grand",
        "mean=aggregate:mean,horizon:stage,estimate:embedding",
        "by=policy:balanced,by:json:domain",
    ]
    assert read_arms(options, str(path)) == {
        "warm": {"temperature": 0.5},
        "hard": {"policy": "el2n", "prefer": "highest"},
        "grand": {"policy": "grand"},
        "mean": {"aggregate": "mean", "horizon": "stage", "estimate": "embedding"},
        "by": {"policy": "balanced", "by": "json:domain"},
    }


def test_arms_differ_from_the_plan_in_the_pruning_only() -> None:
    plan = small_plan(NOWHERE, trust=TRIAL)
    arms = check_arms(
        {"mean": {"aggregate": "mean"}, "hard": {"policy": "grand", "prefer": "highest"}}
    )
    plans = {name: arm_plan(plan, name, arm, {0: 0.5}) for name, arm in arms.items()}
    assert plans[PLAN] == plan.model_copy(update={"run": PLAN})
    own = plan.model_dump()
    for name, found in plans.items():
        values = found.model_dump()
        changed = {key for key in own if own[key] != values[key]}
        assert changed <= {"run", "stages", "score", "trust", "audit"}, name
        for before, after in zip(own["stages"], values["stages"], strict=True):
            assert {key for key in before if before[key] != after[key]} <= {"prune"}
    assert [
        found.stages[0].prune and found.stages[0].prune.model_dump() for found in plans.values()
    ] == [
        {"policy": "top", "keep": 0.5},
        {"policy": "random", "keep": 0.5},
        None,
        {"policy": "top", "keep": 0.5},
        {"policy": "grand", "keep": 0.5, "prefer": "highest"},
    ]
    assert plans["mean"].score == plan.score.model_copy(update={"aggregate": "mean"})


def test_the_random_arm_keeps_what_the_plans_policy_came_to() -> None:
    stages = [
        {"steps": 4, "batch_size": 20, "prune": {"policy": "drop_harmful"}},
        {"steps": 4, "batch_size": 20},
    ]
    plan = small_plan(NOWHERE, stages=stages)
    for name, arm in (
        ("random", ALWAYS["random"]),
        ("loss", {"policy": "loss"}),
        ("half", {"policy": "top", "keep": 0.5}),
    ):
        policy = arm_plan(plan, name, arm, {0: 83 / 140}).stages[0].prune
        assert policy is not None
        assert policy.model_dump()["keep"] == (0.5 if name == "half" else 83 / 140)


@given(
    st.integers(1, 10**7).flatmap(lambda count: st.tuples(st.just(count), st.integers(1, count)))
)
def test_a_share_gives_the_count_back(sizes: tuple[int, int]) -> None:
    count, kept = sizes
    assert round(count * (kept / count)) == kept


@pytest.mark.parametrize(
    ("arms", "expected"),
    [
        ({"random": {"policy": "loss"}}, "every comparison has an arm random"),
        ({"a/b": {"policy": "loss"}}, "'a/b' is no name for an arm"),
        ({"x": {"polcy": "loss"}}, "the arm x: unknown key `polcy`; did you mean `policy`"),
        ({"x": "loss"}, "the arm x is 'loss'; give settings"),
        ({"x": {"policy": "best"}}, r"the arm x: `stages\.0\.prune`: .*'grand', 'el2n'"),
        (
            {"x": {"policy": "threshold"}},
            r"the arm x: `stages\.0\.prune\.threshold\.at_least`: Field required",
        ),
        ({"x": {"at_least": 1}}, r"the arm x: unknown key `stages\.0\.prune\.top\.at_least`"),
        ({"x": {"estimate": "replay"}}, "the arm x: .*set `horizon: stage, aggregate: mean`"),
    ],
)
def test_what_is_no_arm_is_one_sentence(arms: dict[str, Any], expected: str) -> None:
    def made() -> None:
        for name, arm in check_arms(arms).items():
            arm_plan(small_plan(NOWHERE), name, arm, {0: 0.5})

    with pytest.raises(PlanError, match=expected):
        made()


def test_options_and_files_that_are_no_arms_are_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(
        PlanError, match="--arm x=loss is no arm; give a policy's name, or name=key:value"
    ):
        read_arms(["x=loss"])
    with pytest.raises(PlanError, match=r"gone\.yaml cannot be read"):
        read_arms([], str(tmp_path / "gone.yaml"))
    (tmp_path / "list.yaml").write_text("- loss\n")
    with pytest.raises(PlanError, match=r"list\.yaml are no mapping"):
        read_arms([], str(tmp_path / "list.yaml"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("comparison")
    make_data(made)
    return made


def test_what_scores_does_not_judge(folder: Path) -> None:
    target, other = f"{folder}/target-0.tar", f"{folder}/train-0.tar"
    alone = comparable_plan(small_plan(folder))
    assert (alone.judging("clean"), held_out_targets(alone)) == (0.5, ["clean"])
    two = small_plan(folder, targets={"clean": {"shards": target}, "test": {"shards": other}})
    assert (comparable_plan(two).judging("clean"), held_out_targets(comparable_plan(two))) == (
        0.0,
        ["test"],
    )
    halved = comparable_plan(two, "clean")
    assert (halved.judging("clean"), held_out_targets(halved, "clean")) == (0.5, ["clean", "test"])
    selecting = [{"steps": 4, "batch_size": 20, "prune": {"policy": "top", "keep": 0.5},
                  "windows": [{"select": {"target": "test"}}]}, {"steps": 4, "batch_size": 20}]  # fmt: skip
    both = comparable_plan(
        small_plan(folder, stages=selecting, targets=two.model_dump()["targets"])
    )
    assert (both.judging("clean"), both.judging("test"), held_out_targets(both)) == (
        0.5,
        0.0,
        ["clean"],
    )
    gated = comparable_plan(two.model_copy(update={"trust": small_plan(folder, trust=TRIAL).trust}))
    assert held_out_targets(gated) == ["test", "clean"]
    control = arm_plan(gated, "random", ALWAYS["random"], {0: 0.5})
    assert control.judging("clean") == gated.judging("clean") == 0.5
    same = small_plan(
        folder, targets={"clean": {"shards": target}, "copy": {"shards": [other, target]}}
    )
    with pytest.raises(
        PlanError, match="24 samples of target clean, which scores, are in target copy too"
    ):
        comparable_plan(same)
    with pytest.raises(PlanError, match="--judge x is none of the plan's targets clean"):
        comparable_plan(small_plan(folder), "x")


@pytest.mark.parametrize("prunes", [[None, None], [None, {"policy": "top", "keep": 0.5}]])
def test_a_plan_that_prunes_for_nothing_is_refused(prunes: list[Any]) -> None:
    stages = [{"steps": 4, "batch_size": 20, "prune": prune} for prune in prunes]
    with pytest.raises(PlanError, match="no stage of the plan prunes for a later one"):
        comparable_plan(small_plan(NOWHERE, stages=stages))


def test_intervals_are_scipys_t_tests() -> None:
    values = {
        "plan": [0.5, 0.4, 0.6, 0.45],
        "random": [0.8, 0.7, 0.85, 0.9],
        "unpruned": [0.6, 0.7, 0.65, 0.7],
    }
    rows = [
        {"seed": seed, "arm": arm, "stage": stage, "target": "t", "judges": True, "figure": "loss", "value": value + 9 * (1 - stage)}
        for arm, found in values.items() for seed, value in enumerate(found) for stage in (0, 1)
    ]  # fmt: skip
    summary = summarize_figures(
        pl.DataFrame(rows).sample(fraction=1, shuffle=True, seed=0), ("unpruned", "random")
    )
    for arm, found in values.items():
        row = summary.filter(pl.col("arm") == arm).row(0, named=True)
        alone = stats.ttest_1samp(found, 0).confidence_interval()
        assert (row["low"], row["high"]) == pytest.approx((alone.low, alone.high))
        for other in {"unpruned", "random"} - {arm}:
            paired = stats.ttest_rel(found, values[other]).confidence_interval()
            assert (row[f"{other}_low"], row[f"{other}_high"]) == pytest.approx(
                (paired.low, paired.high)
            )
    assert Interval.of([0.5]) == Interval(mean=0.5, low=None, high=None)


@pytest.mark.parametrize(
    ("unpruned", "random", "expected"),
    [
        ([-2.0, -2.1], [-1.0, -1.1], "pruning pays"),
        ([2.0, 2.1], [-1.0, -1.1], "pruning does harm"),
        (
            [-2.0, -2.1],
            [1.0, -1.1],
            "fewer samples pay, but that these were chosen is not shown to matter",
        ),
        ([-2.0, -2.1], [1.0, 1.1], "fewer samples pay, but that these were chosen does harm"),
        ([-2.0, 2.1], [-1.0, -1.1], "that pruning pays is not shown"),
        ([-2.0], [-1.0], "one seed gives no interval"),
    ],
)
def test_the_verdict_is_what_the_intervals_show(
    unpruned: list[float], random: list[float], expected: str
) -> None:
    gaps = {"unpruned": Interval.of(unpruned), "random": Interval.of(random)}
    own = ArmResult(
        arm="plan",
        samples=1,
        steps=1,
        train_seconds=1,
        select_seconds=None,
        figures={},
        differences={"loss": gaps},
    )
    assert summarize_verdict("test", own).endswith(expected) or expected in summarize_verdict(
        "test", own
    )


def test_copies_are_the_same_artefacts(base: str) -> None:
    source, target = Folder(f"{base}/one"), Folder(f"{base}/two")
    for name in ("a", "deep/b", "left/c"):
        with Output(source.child(*name.split("/"))).attempt("kind", {"of": name}) as attempt:
            attempt.write("folder/file.bin", name.encode() * 1000)
            attempt.facts["name"] = name
    for _ in range(2):
        copy_outputs(source, target, without=("left",))
    assert len([name for name in target.files() if name.endswith("file.bin")]) == 2
    for name in ("a", "deep/b"):
        one, two = (Output(root.child(*name.split("/"))) for root in (source, target))
        assert (one.fingerprint, one.manifest.facts) == (two.fingerprint, two.manifest.facts)
        assert two.read("folder/file.bin") == name.encode() * 1000
    assert not Output(target.child("left", "c")).committed

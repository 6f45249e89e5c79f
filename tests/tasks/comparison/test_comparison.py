"""Arms, what they share, their intervals and the verdict.

The runs themselves are in tests/flows/test_compare.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from secateur.errors import PlanError
from secateur.storage.copy_outputs import copy_outputs
from secateur.storage.folder import Folder
from secateur.storage.integrity import verify_folder
from secateur.storage.outputs import Output
from secateur.tasks.comparison.arm_runs import comparable_plan, held_out_targets
from secateur.tasks.comparison.arms import (
    PLAN,
    STANDARD_ARMS,
    arm_plan,
    check_arms,
    check_shared_checkpoints,
    read_arms,
)
from secateur.tasks.comparison.comparison_report import ArmResult, summarize_verdict
from secateur.tasks.comparison.figures import Interval, summarize_figures
from tests.tasks.small import make_data, small_plan

NOWHERE = Path("/nowhere")
TRIAL = {"trial": {"steps": 3}}
EFFECT = {"horizon": "stage", "aggregate": "mean"}


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


def test_arms_differ_from_the_plan_only_in_their_pruning() -> None:
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


def test_the_random_arm_keeps_as_many_as_the_plans_policy() -> None:
    stages = [
        {"steps": 4, "batch_size": 20, "prune": {"policy": "drop_harmful"}},
        {"steps": 4, "batch_size": 20},
    ]
    plan = small_plan(NOWHERE, stages=stages)
    for name, arm in (
        ("random", STANDARD_ARMS["random"]),
        ("loss", {"policy": "loss"}),
        ("half", {"policy": "top", "keep": 0.5}),
    ):
        policy = arm_plan(plan, name, arm, {0: 83 / 140}).stages[0].prune
        assert policy is not None
        assert policy.model_dump()["keep"] == (0.5 if name == "half" else 83 / 140)


@given(
    st.integers(1, 10**7).flatmap(lambda count: st.tuples(st.just(count), st.integers(1, count)))
)
def test_a_share_gives_back_the_count(sizes: tuple[int, int]) -> None:
    count, kept = sizes
    assert round(count * (kept / count)) == kept


@pytest.mark.parametrize(
    ("arms", "expected"),
    [
        ({"random": {"policy": "loss"}}, "every comparison has an arm random"),
        ({"a/b": {"policy": "loss"}}, "'a/b' cannot name an arm"),
        ({"x": {"polcy": "loss"}}, "the arm x: unknown key `polcy`; did you mean `policy`"),
        ({"x": "loss"}, "the arm x is 'loss'; give settings"),
        ({"x": {"policy": "best"}}, r"the arm x: `stages\.0\.prune`: .*'grand', 'el2n'"),
        (
            {"x": {"policy": "threshold"}},
            r"the arm x: `stages\.0\.prune\.at_least`: Field required",
        ),
        ({"x": {"at_least": 1}}, r"the arm x: unknown key `stages\.0\.prune\.at_least`"),
        ({"x": {"estimate": "replay"}}, "the arm x: .*add `horizon: stage, aggregate: mean`"),
    ],
)
def test_an_impossible_arm_is_one_sentence(arms: dict[str, Any], expected: str) -> None:
    def make_plans() -> None:
        for name, arm in check_arms(arms).items():
            arm_plan(small_plan(NOWHERE), name, arm, {0: 0.5})

    with pytest.raises(PlanError, match=expected):
        make_plans()


def test_options_and_files_without_arms_are_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(
        PlanError, match="--arm x=loss is not an arm; give a policy's name, or name=key:value"
    ):
        read_arms(["x=loss"])
    with pytest.raises(PlanError, match=r"gone\.yaml cannot be read"):
        read_arms([], str(tmp_path / "gone.yaml"))
    (tmp_path / "list.yaml").write_text("- loss\n")
    with pytest.raises(PlanError, match=r"list\.yaml are not a mapping"):
        read_arms([], str(tmp_path / "list.yaml"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("comparison")
    make_data(folder)
    return folder


def test_a_comparison_asks_questions_only_if_a_gate_needs_the_answers(folder: Path) -> None:
    by_embedding = {"estimate": "embedding", "horizon": "stage"}
    trust = {"questions": 3, "min_agreement": 0.5}
    gated = comparable_plan(small_plan(folder, score=by_embedding, trust=trust))
    assert gated.trust.asked == 3
    assert arm_plan(gated, "random", STANDARD_ARMS["random"], {0: 0.5}).trust.asked == 0
    for score, demand in (({}, 0.5), (by_embedding, None)):
        plan = small_plan(folder, score=score, trust={"questions": 3, "min_agreement": demand})
        assert comparable_plan(plan).trust.asked == 0


def test_a_comparison_evaluates_on_samples_that_do_not_score(folder: Path) -> None:
    target = f"{folder}/target-0.tar"
    other = f"{folder}/train-0.tar"
    single = comparable_plan(small_plan(folder))
    assert (single.held_out_share("clean"), held_out_targets(single)) == (0.5, ["clean"])
    two = small_plan(folder, targets={"clean": {"shards": target}, "test": {"shards": other}})
    plan = comparable_plan(two)
    assert (plan.held_out_share("clean"), held_out_targets(plan)) == (0.0, ["test"])
    split = comparable_plan(two, "clean")
    assert split.held_out_share("clean") == 0.5
    assert held_out_targets(split, "clean") == ["clean", "test"]
    window = {"select": {"target": "test"}}
    stage = {"steps": 4, "batch_size": 20}
    selecting = stage | {"prune": {"policy": "top", "keep": 0.5}, "windows": [window]}
    targets = two.model_dump()["targets"]
    both = comparable_plan(small_plan(folder, stages=[selecting, stage], targets=targets))
    assert (both.held_out_share("clean"), both.held_out_share("test")) == (0.5, 0.0)
    assert held_out_targets(both) == ["clean"]
    gated = comparable_plan(two.model_copy(update={"trust": small_plan(folder, trust=TRIAL).trust}))
    assert held_out_targets(gated) == ["test", "clean"]
    control = arm_plan(gated, "random", STANDARD_ARMS["random"], {0: 0.5})
    assert control.held_out_share("clean") == gated.held_out_share("clean") == 0.5
    same = small_plan(
        folder, targets={"clean": {"shards": target}, "copy": {"shards": [other, target]}}
    )
    with pytest.raises(
        PlanError,
        match="24 samples of target clean, which scores training samples, are also in target copy",
    ):
        comparable_plan(same)
    with pytest.raises(PlanError, match="--judge x is none of the plan's targets clean"):
        comparable_plan(small_plan(folder), "x")


@pytest.mark.parametrize("prunes", [[None, None], [None, {"policy": "top", "keep": 0.5}]])
def test_a_plan_that_prunes_for_no_later_stage_is_refused(prunes: list[Any]) -> None:
    stages = [{"steps": 4, "batch_size": 20, "prune": prune} for prune in prunes]
    with pytest.raises(PlanError, match="no stage of the plan prunes for a later one"):
        comparable_plan(small_plan(NOWHERE, stages=stages))


def test_intervals_equal_scipys_t_tests() -> None:
    values = {
        "plan": [0.5, 0.4, 0.6, 0.45],
        "random": [0.8, 0.7, 0.85, 0.9],
        "unpruned": [0.6, 0.7, 0.65, 0.7],
    }
    same = {"target": "t", "judges": True, "figure": "loss"}
    rows = [
        {"seed": seed, "arm": arm, "stage": stage, "value": value + 9 * (1 - stage), **same}
        for arm, found in values.items()
        for seed, value in enumerate(found)
        for stage in (0, 1)
    ]
    summary = summarize_figures(
        pl.DataFrame(rows).sample(fraction=1, shuffle=True, seed=0), ("unpruned", "random")
    )
    for arm, found in values.items():
        row = summary.filter(pl.col("arm") == arm).row(0, named=True)
        single = stats.ttest_1samp(found, 0).confidence_interval()
        assert (row["low"], row["high"]) == pytest.approx((single.low, single.high))
        for other in {"unpruned", "random"} - {arm}:
            paired = stats.ttest_rel(found, values[other]).confidence_interval()
            assert (row[f"{other}_low"], row[f"{other}_high"]) == pytest.approx(
                (paired.low, paired.high)
            )
    assert Interval.from_values([0.5]) == Interval(mean=0.5, low=None, high=None)


@pytest.mark.parametrize(
    ("unpruned", "random", "expected"),
    [
        ([-2.0, -2.1], [-1.0, -1.1], "pruning pays"),
        ([2.0, 2.1], [-1.0, -1.1], "pruning does harm"),
        (
            [-2.0, -2.1],
            [1.0, -1.1],
            "fewer samples help, but the plan's choice is not shown to be better than a random one",
        ),
        (
            [-2.0, -2.1],
            [1.0, 1.1],
            "fewer samples help, but the plan's choice is worse than a random one",
        ),
        ([-2.0, 2.1], [-1.0, -1.1], "no benefit of pruning is shown"),
        ([-2.0], [-1.0], "one seed gives no interval, so run more seeds"),
    ],
)
def test_the_verdict_follows_from_the_intervals(
    unpruned: list[float], random: list[float], expected: str
) -> None:
    gaps = {"unpruned": Interval.from_values(unpruned), "random": Interval.from_values(random)}
    own = ArmResult(
        arm="plan",
        samples=1,
        steps=1,
        train_seconds=1,
        select_seconds=None,
        figures={},
        differences={"loss": gaps},
    )
    assert summarize_verdict("test", own).endswith(f": {expected}")


def test_copied_outputs_equal_the_originals(base: str) -> None:
    source = Folder(f"{base}/one")
    target = Folder(f"{base}/two")
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


def test_a_copy_of_an_output_lacks_the_files_that_were_removed_on_purpose(base: str) -> None:
    source = Folder(f"{base}/one")
    with Output(source.child("a")).attempt("kind", {}) as attempt:
        attempt.write("kept.bin", b"kept")
        attempt.write("removed.bin", b"removed")
    Output(source.child("a")).remove_file("removed.bin")
    copy_outputs(source, Folder(f"{base}/two"))
    copied = Output(Folder(f"{base}/two/a"))
    assert copied.fingerprint == Output(source.child("a")).fingerprint
    assert copied.read("kept.bin") == b"kept"
    assert copied.is_removed("removed.bin")
    assert list(verify_folder(Folder(base))) == []


@pytest.mark.parametrize(
    ("own", "arm", "expected"),
    [
        ({}, {}, None),
        ({}, {"policy": "tracin"}, "the policy tracin"),
        ({"prune": {"policy": "tracin", "keep": 0.5}}, {"policy": "tracin"}, None),
        ({"score": EFFECT}, {"policy": "tracin"}, "the policy tracin"),
        ({"score": EFFECT}, {"policy": "loss"}, None),
        ({}, EFFECT, "replay"),
        ({}, {**EFFECT, "estimate": "embedding"}, None),
    ],
)
def test_an_arm_that_reads_removed_checkpoints_is_refused(
    own: dict[str, Any], arm: dict[str, Any], expected: str | None
) -> None:
    stages = small_plan(NOWHERE).model_dump(mode="json", exclude_unset=True)["stages"]
    stages[0]["prune"] = own.pop("prune", stages[0]["prune"])
    for keep in ("segments", "stage_ends"):
        plan = small_plan(NOWHERE, checkpoints={"keep": keep}, stages=stages, **own)
        other = arm_plan(plan, "other", arm, {0: 0.5})
        if expected and keep == "stage_ends":
            with pytest.raises(PlanError, match=f"in the arm other, {expected} reads"):
                check_shared_checkpoints(plan, other)
        else:
            check_shared_checkpoints(plan, other)

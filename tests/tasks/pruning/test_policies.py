"""Pruning policies, compared with the same rules in plain Python."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from examples.shards import write_shards
from secateur.errors import PlanError
from secateur.storage.shard_listing import list_shards
from secateur.storage.shards import Samples
from secateur.tasks.plan import POLICIES
from secateur.tasks.pruning.context import PruningContext
from secateur.tasks.pruning.decide import count_decisions, decide_samples
from secateur.tasks.pruning.policies import baselines
from secateur.tasks.run import Run
from tests.tasks.small import sample, small_plan

COUNT = 30
USES = st.lists(
    st.tuples(
        st.integers(0, COUNT - 1),
        st.sampled_from([-2.0, -1.0, 0.0, 0.5, 0.5, 3.0]),
        st.floats(0, 5, width=16),
    ),
    min_size=1,
    max_size=80,
)


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Samples:
    folder = tmp_path_factory.mktemp("policies")
    write_shards(f"{folder}/t-%d.tar", [sample(n) for n in range(COUNT)], 1)
    return Samples([f"{folder}/t-0.tar"], list_shards([f"{folder}/t-0.tar"]))


@dataclass(frozen=True)
class FixedScores(PruningContext):
    """A context whose scores are given, in place of those of a run on disk."""

    scores: pl.DataFrame

    def read_scores(self) -> pl.DataFrame:
        return self.scores


def decide(
    uses: list[Any], samples: Samples, policy: dict[str, Any], aggregate: str = "nearest"
) -> pl.DataFrame:
    """Decide about samples whose uses have the given row, score and loss, in the order of steps."""
    rows, scores, losses = map(list, zip(*uses, strict=True))
    frame = pl.DataFrame(
        {
            "sample": pl.Series(rows, dtype=pl.UInt32),
            "step": range(len(uses)),
            "score_clean": scores,
            "loss": pl.Series(losses, dtype=pl.Float64),
            "grand": pl.Series([loss**2 for loss in losses], dtype=pl.Float64),
            "el2n": pl.Series([3 * loss for loss in losses], dtype=pl.Float64),
        }
    )
    plan = small_plan(Path("/"), score={"aggregate": aggregate})
    context = FixedScores(Run.of_plan(plan), 0, samples, frame)
    tracin = -torch.tensor(losses, dtype=torch.float64)[:, None]
    with pytest.MonkeyPatch.context() as patch:
        # TracIn reads gradients of a run on disk, and there is none.
        patch.setattr(baselines, "stage_tracin_scores", lambda run, stage: tracin)
        return decide_samples(POLICIES.parse(policy), context)


@settings(deadline=None)
@given(USES, st.sampled_from(["mean", "nearest"]), st.floats(0.05, 1))
def test_top_keeps_the_best_scores(
    samples: Samples, uses: list[Any], aggregate: str, keep: float
) -> None:
    found = decide(uses, samples, {"policy": "top", "keep": keep}, aggregate)
    score: dict[int, float] = {}
    for row, value, _ in uses:
        score[row] = score.get(row, 0.0) + value if aggregate == "mean" else value
    ordered = sorted(score, key=lambda row: (-score[row], row))
    quota = round(len(ordered) * keep)
    dropped = set(ordered[quota:])
    assert found["sample"].to_list() == list(range(COUNT))
    assert found["keep"].to_list() == [row not in dropped for row in range(COUNT)]
    assert found.filter(pl.col("rank").is_not_null()).sort("rank")["sample"].to_list() == ordered
    assert found["reason"].is_null().sum() == 0
    assert found.filter(pl.col("uses") == 0)["keep"].all()


def is_lowest(values: np.ndarray, share: float) -> np.ndarray:
    """Whether each value is among the lowest share."""
    return np.argsort(np.argsort(values)) < round(COUNT * share)


@pytest.mark.parametrize(
    ("policy", "kept"),
    [
        ({"policy": "threshold", "at_least": 0.5}, lambda score, loss: score >= 0.5),
        ({"policy": "drop_harmful"}, lambda score, loss: score >= 0),
        ({"policy": "loss", "keep": 0.4}, lambda score, loss: is_lowest(loss, 0.4)),
        (
            {"policy": "loss", "keep": 0.4, "prefer": "highest"},
            lambda score, loss: is_lowest(-loss, 0.4),
        ),
        ({"policy": "grand", "keep": 0.7}, lambda score, loss: is_lowest(loss, 0.7)),
        (
            {"policy": "el2n", "keep": 0.7, "prefer": "highest"},
            lambda score, loss: is_lowest(-loss, 0.7),
        ),
        ({"policy": "tracin", "keep": 0.7}, lambda score, loss: is_lowest(loss, 0.7)),
    ],
)
def test_policies_keep_what_their_rule_says(
    samples: Samples, policy: dict[str, Any], kept: Any
) -> None:
    rng = np.random.default_rng(0)
    score, loss = rng.standard_normal(COUNT), rng.permutation(COUNT) / COUNT
    found = decide(list(zip(range(COUNT), score, loss, strict=True)), samples, policy)
    expected = kept(score, loss)
    assert found["keep"].to_list() == expected.tolist()
    summary = count_decisions(found)
    assert summary["kept"] == expected.sum()
    assert sum(summary["reasons"].values()) == summary["dropped"] == COUNT - summary["kept"]


def test_a_baseline_reads_the_last_use_and_tracin_the_sum(samples: Samples) -> None:
    uses = [(0, 0.0, 1.0), (1, 0.0, 2.0), (0, 0.0, 2.5), (1, 0.0, 2.0)]
    for policy in ("loss", "grand", "el2n"):
        found = decide(uses, samples, {"policy": policy, "keep": 0.5})
        assert found["keep"][:2].to_list() == [False, True]
    found = decide(uses, samples, {"policy": "tracin", "keep": 0.5})
    assert found["score"][:2].to_list() == [-3.5, -4.0]
    assert found["keep"][:2].to_list() == [True, False]


def test_an_unknown_measure_ranks_last_at_either_end(samples: Samples) -> None:
    for prefer in ("lowest", "highest"):
        uses = [(0, 0.0, float("nan")), (1, 0.0, 2.0)]
        assert decide(uses, samples, {"policy": "el2n", "keep": 0.5, "prefer": prefer})["rank"][
            :2
        ].to_list() == [2, 1]


@pytest.mark.parametrize("by", ["cls", "json:parity"])
def test_balanced_keeps_the_same_share_of_every_group(samples: Samples, by: str) -> None:
    rng = np.random.default_rng(0)
    score = rng.standard_normal(COUNT)
    found = decide(
        [(n, score[n], 1.0) for n in range(COUNT)],
        samples,
        {"policy": "balanced", "keep": 0.5, "by": by},
    )
    labels = [int(s["cls"]) for s in samples.read(range(COUNT))]
    groups = [label if by == "cls" else label % 2 for label in labels]
    for group in set(groups):
        rows = sorted((n for n in range(COUNT) if groups[n] == group), key=lambda n: -score[n])
        quota = round(len(rows) * 0.5)
        assert [n for n in rows if found["keep"][n]] == rows[:quota]


@pytest.mark.parametrize("by", ["nothing", "json:nothing", "raw:x"])
def test_balancing_by_a_missing_field_is_one_sentence(samples: Samples, by: str) -> None:
    with pytest.raises(PlanError, match=f"sample digit-0000 has no {by} to group by"):
        decide([(0, 1.0, 1.0)], samples, {"policy": "balanced", "keep": 0.5, "by": by})


def test_random_depends_on_the_seed_and_not_on_scores(samples: Samples) -> None:
    policy = {"policy": "random", "keep": 0.5}
    one = decide([(n, float(n), 1.0) for n in range(COUNT)], samples, policy)
    other = decide([(n, float(-n), 2.0) for n in range(COUNT)], samples, policy)
    assert one["keep"].to_list() == other["keep"].to_list()
    assert one["keep"].sum() == COUNT / 2
    assert one["keep"].to_list() != sorted(one["keep"].to_list())

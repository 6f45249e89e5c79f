"""Checkpoints of `keep: stage_ends`: what remains, what is read before, kills, and refusals."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from secateur.errors import PlanError
from secateur.flows.curate import curate_stages
from secateur.flows.stage import audit_stage, prune_stage
from secateur.flows.workers import InlineWorkers
from secateur.storage.integrity import find_stray_files, verify_folder
from secateur.storage.ledger import CHECKPOINT
from secateur.tasks.plan import POLICIES, Plan
from secateur.tasks.reporting.dry_run import estimate_audit_cost
from secateur.tasks.results.audit_results import read_audit
from secateur.tasks.results.pruning_results import read_decisions
from secateur.tasks.results.valuation_results import read_scores
from secateur.tasks.run import Run
from secateur.tasks.training import train
from secateur.tasks.valuation.query import find_influential
from secateur.tasks.valuation.replay import replay_stage
from tests.tasks.small import curate_small, make_data, small_plan, values
from tests.tasks.test_run import differing

STAGE_ENDS = {"checkpoints": {"keep": "stage_ends"}}
# Stage 0 has 4 segments, and stage 1 has 2.
STAYING = ["stages/00/ledger/seg-00003", "stages/00/start", "stages/01/ledger/seg-00001"]
TRACIN = {"policy": "tracin", "keep": 0.5}
EFFECT = {"horizon": "stage", "aggregate": "mean"}
READ: dict[str, dict[str, Any]] = {
    "replay": {"score": EFFECT},
    "audit": {"audit": {"removals": 4, "stages": [0]}},
    "gate": {"score": {**EFFECT, "estimate": "embedding"}, "trust": {"min_fidelity": -1}},
    "questions": {"trust": {"questions": 2}},
    "tracin": {
        "stages": [
            {"steps": 14, "batch_size": 20, "prune": TRACIN},
            {"steps": 8, "batch_size": 20},
        ]
    },
}
TRAIN = """
import json, os, signal, sys
from secateur.storage.folder import Folder
from secateur.tasks.plan import Plan
from tests.tasks.small import curate_small
remove, moment, count = Folder.remove, sys.argv[2], int(sys.argv[3])
def kill_at_removal(folder, name):
    global count
    if name == "checkpoint.safetensors":
        count -= 1
        if not count and moment == "before":
            os.kill(os.getpid(), signal.SIGKILL)
    remove(folder, name)
    if name == "checkpoint.safetensors" and not count and moment == "after":
        os.kill(os.getpid(), signal.SIGKILL)
Folder.remove = kill_at_removal
curate_small(Plan.model_validate(json.loads(sys.argv[1])))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints")
    make_data(folder)
    return folder


@pytest.fixture(scope="module")
def whole(folder: Path) -> Run:
    """A run that keeps every checkpoint."""
    return curate_small(small_plan(folder))


def checkpoints(run: Run) -> list[str]:
    """The outputs whose checkpoint is on disk."""
    names = [name for name in run.folder.root.files() if name.endswith(f"/{CHECKPOINT}")]
    return [name.rsplit("/", 2)[0] for name in names]


def assert_intact(run: Run) -> None:
    assert list(verify_folder(run.folder.root)) == []
    assert find_stray_files(run.folder.root) == []


def curate(plan: Plan) -> Run:
    """Run a plan as `secateur run` does, without Prefect."""
    run = Run.start(plan)
    curate_stages(InlineWorkers(), run)
    return run


@pytest.mark.parametrize("store", ["local", "bucket"])
def test_only_the_ends_of_stages_stay_and_nothing_else_changes(
    whole: Run, folder: Path, store: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    root = str(tmp_path)
    if store == "bucket":
        root = f"{request.getfixturevalue(store)}/{tmp_path.name}"
    run = curate_small(small_plan(folder, root=root, **STAGE_ENDS))
    assert checkpoints(run) == STAYING
    assert len(checkpoints(whole)) == 7
    assert differing(whole, run) == []
    assert_intact(run)
    assert [hit.key for hit in find_influential(run, sample="digit-0003").hits] == [
        hit.key for hit in find_influential(whole, sample="digit-0003").hits
    ]


def test_training_holds_one_checkpoint_beside_the_start(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = small_plan(folder, run="held", **STAGE_ENDS)
    counts = []
    record_step = train._train_step

    def count(*arguments: Any) -> None:
        found = checkpoints(Run.of_plan(plan))
        counts.append(sum(name.startswith("stages/00") for name in found))
        record_step(*arguments)

    monkeypatch.setattr(train, "_train_step", count)
    curate_small(plan)
    assert counts == [1] * 6 + [2] * (15 + 10)


@pytest.mark.parametrize(
    ("count", "moment"),
    [
        (1, "after"),
        pytest.param(1, "before", marks=pytest.mark.slow),
        pytest.param(4, "before", marks=pytest.mark.server),
        pytest.param(4, "after", marks=pytest.mark.server),
    ],
)
def test_a_run_killed_while_it_removes_continues_to_the_same_bytes(
    whole: Run, folder: Path, tmp_path: Path, moment: str, count: int
) -> None:
    """Removal 1 is during training. Removal 4 is the first that follows the last segment."""
    changes = {"root": str(tmp_path), **STAGE_ENDS}
    plan = json.dumps(values(folder, **changes))
    command = [sys.executable, "-c", TRAIN, plan, moment, str(count)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    assert subprocess.run(command, env=environment, check=False).returncode == -signal.SIGKILL
    killed = Run.open(f"{tmp_path}/small")
    assert len(killed.folder.stage(0).segments()) == {1: 2, 4: 4}[count]
    assert not killed.folder.stage(0).trained.committed
    resumed = curate_small(small_plan(folder, **changes))
    assert checkpoints(resumed) == STAYING
    assert differing(whole, resumed) == []
    assert_intact(resumed)


@pytest.mark.parametrize("step", [6, 20])
def test_an_interrupted_stage_continues_at_its_last_whole_segment(
    whole: Run, folder: Path, step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = small_plan(folder, root=f"{folder}/resumed{step}", **STAGE_ENDS)
    record_step = train._train_step
    steps: list[int] = []

    def interrupt(*arguments: Any) -> None:
        if arguments[-1] == step and step not in steps:
            steps.append(step)
            raise KeyboardInterrupt
        steps.append(arguments[-1])
        record_step(*arguments)

    monkeypatch.setattr(train, "_train_step", interrupt)
    with pytest.raises(KeyboardInterrupt):
        curate_small(plan)
    resumed = curate_small(plan)
    assert steps[step + 1] == step // 6 * 6
    assert differing(whole, resumed) == []
    assert checkpoints(resumed) == STAYING


@pytest.mark.parametrize(
    "name",
    [
        "replay",
        "questions",
        "tracin",
        *(pytest.param(n, marks=pytest.mark.server) for n in ("audit", "gate")),
    ],
)
def test_what_the_plan_reads_is_kept_until_it_is_read(folder: Path, name: str) -> None:
    """Stage 1 has no audit and no policy, so its checkpoints go as it trains, unless it replays.

    It does for scores and for questions.
    """
    kept = curate(small_plan(folder, run=f"{name}-kept", **READ[name]))
    plan = small_plan(folder, run=name, **READ[name], **STAGE_ENDS)
    run = Run.start(plan)
    assert len(plan.checkpoint_readers(0)) == 1
    curate_small(plan)  # it removes nothing after training
    stage = "stages/00/ledger"
    assert sum(one.startswith(stage) for one in checkpoints(run)) == len(
        run.folder.stage(0).segments()
    )
    run = curate(plan)
    assert len(checkpoints(run)) == 3
    assert read_decisions(run, 0)["keep"].equals(read_decisions(kept, 0)["keep"])
    for number in (0, 1):
        found = read_scores(run, number).drop("shard")
        assert found.equals(read_scores(kept, number).drop("shard"))
    if plan.audits(0):
        found_audit = read_audit(run, 0).model_dump(exclude={"plot"})
        assert found_audit == read_audit(kept, 0).model_dump(exclude={"plot"})
    assert_intact(run)
    before = run.folder.root.sizes()
    assert curate(plan).folder.root.sizes() == before


def test_what_needs_removed_checkpoints_is_one_sentence(folder: Path) -> None:
    plan = small_plan(folder, run="refusing", **STAGE_ENDS)
    curate_small(plan)
    run = Run.open(Run.of_plan(plan).url)
    sentence = r"checkpoints within stage 0 of .* are removed already .*`keep: segments`"
    policy = POLICIES.parse({"policy": "tracin", "keep": 0.5})
    with pytest.raises(PlanError, match=sentence):
        estimate_audit_cost(run, 0)
    with pytest.raises(PlanError, match=sentence):
        audit_stage(InlineWorkers(), run.url, 0, 4)
    with pytest.raises(PlanError, match=sentence):
        replay_stage(run, 0)
    with pytest.raises(PlanError, match=sentence):
        prune_stage(InlineWorkers(), run.url, 0, policy)
    assert len(prune_stage(InlineWorkers(), run.url, 0).shards) == 2
    with pytest.raises(PlanError, match="they differ in checkpoints"):
        Run.start(small_plan(folder, run="refusing"))


def test_a_stage_of_one_segment_loses_no_checkpoint(folder: Path) -> None:
    plan = small_plan(folder, run="short", segment_steps=50, **STAGE_ENDS)
    run = curate_small(plan)
    assert len(checkpoints(run)) == 3
    replay_stage(run, 0)


def test_a_moved_run_still_knows_what_was_removed(folder: Path, tmp_path: Path) -> None:
    run = curate_small(small_plan(folder, root=f"{tmp_path}/here", **STAGE_ENDS))
    (tmp_path / "there").mkdir()
    os.rename(run.url, f"{tmp_path}/there/small")
    moved = Run.open(f"{tmp_path}/there/small")
    assert checkpoints(moved) == STAYING
    assert_intact(moved)
    with pytest.raises(PlanError, match="are removed already"):
        estimate_audit_cost(moved, 0)

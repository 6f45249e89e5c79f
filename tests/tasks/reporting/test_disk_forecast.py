"""The disk that `secateur plan` foretells, against the files of real runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from secateur.flows.curate import curate_stages
from secateur.flows.workers import InlineWorkers
from secateur.storage.tensors import TensorStack
from secateur.tasks.reporting.disk_forecast import StageEstimate
from secateur.tasks.reporting.dry_run import estimate_run
from secateur.tasks.results.valuation_results import (
    read_directions,
    read_embeddings,
    read_transition,
)
from secateur.tasks.run import Run
from secateur.tasks.training import checkpoint_removal, segments
from tests.tasks.small import curate_small, make_data, small_plan

ADAMW = {
    "optimizer": {"kind": "adamw", "lr": 0.01},
    "basis": {"kind": "coordinates", "numbers": 100},
}
EFFECT = {"score": {"horizon": "stage", "aggregate": "mean"}}
MODEL = {"model": {"factory": "tests.tasks.digits:network", "args": {"width": 200}}}
STAGE_ENDS = {"checkpoints": {"keep": "stage_ends"}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("disk")
    make_data(path)
    return path


def measured(run: Run, stage: int, name: str) -> int:
    """The bytes of the tensors in a stage's files of a name, without the files' headers."""
    paths = run.folder.stage(stage).root.local_path("").rglob(f"{name}.safetensors")
    files = [path.read_bytes() for path in paths]
    return sum(len(data) - 8 - int.from_bytes(data[:8], "little") for data in files)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        ADAMW,
        {"curvature": {"kind": "fisher"}},
        {"curvature": {"kind": "fisher", "draws": 30, "rows": 170}},
        {
            "task": {"factory": "tests.tasks.ranks:NegatedDigits"},
            "curvature": {"kind": "empirical_fisher", "draws": 7},
        },
        {"curvature": {"kind": "hessian", "every": 4, "coupling": "full"}},
        {"curvature": {"kind": "gauss_newton", "every": 4}},
        {**ADAMW, **EFFECT, "segment_steps": 5},
        {**ADAMW, **STAGE_ENDS, "components": 20},
    ],
)
def test_the_disk_of_a_stage_is_that_of_its_files(folder: Path, changes: dict[str, Any]) -> None:
    plan = small_plan(folder, run=f"disk-{abs(hash(str(changes)))}", **MODEL, **changes)
    estimates = estimate_run(plan).stages
    run = curate_small(plan)
    for stage, estimate in enumerate(estimates):
        # What grows with neither samples nor steps is not counted: each coefficient's group.
        assert measured(run, stage, "ledger") == pytest.approx(
            estimate.ledger_bytes, rel=0.02, abs=4 * 8 * 416
        )
        checkpoints = measured(run, stage, "checkpoint")
        assert checkpoints == pytest.approx(estimate.kept_checkpoint_bytes, rel=0.01)
        vectors = estimate.records * run_width(run, stage) * 4
        assert estimate.embedding_bytes == vectors + directions_bytes(run, stage)
        replays = [name for name in run.folder.stage(stage).root.sizes() if "replay" in name]
        assert bool(replays) == bool(estimate.replay_bytes)
        # Half of them stay: one adjoint per target.
        assert measured(run, stage, "adjoint") == estimate.replay_bytes / 2


def directions_bytes(run: Run, stage: int) -> int:
    """The directions of reduced embeddings, and where they lead in the stage before."""
    if not run.plan.components:
        return 0
    directions = read_directions(run, stage).nbytes
    if stage == 0:
        return directions
    return directions + read_transition(run.folder.stage(stage).embeddings)[0].nbytes


def run_width(run: Run, stage: int) -> int:
    """The columns of a stage's embeddings."""
    return read_embeddings(run.folder.stage(stage).embeddings)[0].shape[1]


@pytest.mark.parametrize("reads", [False, True])
def test_the_most_checkpoints_at_one_time(
    folder: Path, reads: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a plan that keeps those at stage ends, and may read the others before."""
    changes = {**STAGE_ENDS, **(EFFECT if reads else {})}
    plan = small_plan(folder, run=f"most-{reads}", **MODEL, **changes)
    estimates = estimate_run(plan).stages
    most = [0, 0]
    remove = checkpoint_removal.remove_checkpoint_before

    def look(run: Run, stage: int, number: int) -> None:
        most[stage] = max(most[stage], measured(run, stage, "checkpoint"))
        remove(run, stage, number)

    monkeypatch.setattr(segments, "remove_checkpoint_before", look)
    run = Run.start(plan)
    curate_stages(InlineWorkers(), run)
    for stage, estimate in enumerate(estimates):
        assert most[stage] == pytest.approx(estimate.checkpoint_bytes, rel=0.01)
        kept = measured(run, stage, "checkpoint")
        assert kept == pytest.approx(estimate.kept_checkpoint_bytes, rel=0.01)


def test_stages_add_up_to_the_largest_moment(folder: Path) -> None:
    estimate = estimate_run(small_plan(folder, run="moment", **STAGE_ENDS))
    first, second = estimate.stages

    def lasting(stage: StageEstimate) -> int:
        return stage.ledger_bytes + stage.embedding_bytes + stage.index_bytes

    assert estimate.disk_bytes == max(
        lasting(first) + first.embedding_bytes + first.checkpoint_bytes,
        lasting(first)
        + first.kept_checkpoint_bytes
        + lasting(second)
        + second.embedding_bytes
        + second.checkpoint_bytes,
    )


def test_the_temporary_files_of_replay(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = small_plan(folder, run="tape", **MODEL, **ADAMW, **EFFECT)
    pushed: list[int] = []
    push = TensorStack.push

    def count(stack: TensorStack, tensors: Any) -> None:
        push(stack, tensors)
        pushed.append(sum(path.stat().st_size for path in Path(stack._folder.name).iterdir()))

    monkeypatch.setattr(TensorStack, "push", count)
    curate_small(plan)
    assert max(pushed) == pytest.approx(estimate_run(plan).replay_disk_bytes, rel=0.05)

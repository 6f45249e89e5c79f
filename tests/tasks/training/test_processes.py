"""A plan's stages trained in several processes: the ledger, the decisions, and errors."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from secateur.errors import PlanError, SecateurError
from secateur.flows.stage import prune_stage, score_stage, train_stage
from secateur.storage.integrity import find_stray_files
from secateur.storage.ledger import read_checkpoint
from secateur.tasks.data.samples import list_stage_samples, read_stage_samples
from secateur.tasks.plan import LaunchConfig, Plan
from secateur.tasks.results.pruning_results import read_decisions
from secateur.tasks.run import Run
from secateur.tasks.training.fit_basis import fit_basis
from secateur.tasks.training.launch import train_in_processes
from secateur.tasks.training.loop import TrainingLoop
from secateur.tasks.training.segments import restore_segment_start, segment_bounds
from secateur.tasks.valuation.dynamics import read_segment
from tests.tasks.external.test_processes import ADAMW, SGD, plan_of
from tests.tasks.ranks import find_processes, kill_a_process, ledger_distance
from tests.tasks.small import INLINE, curate_small, make_data, sample


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("launched")
    make_data(folder)
    return folder


@pytest.mark.parametrize(
    ("optimizer", "shard"),
    [
        pytest.param(SGD, "none", marks=pytest.mark.server),
        pytest.param(SGD, "fsdp", marks=pytest.mark.slow),
        pytest.param(ADAMW, "none", marks=pytest.mark.slow),
        pytest.param(ADAMW, "fsdp", marks=pytest.mark.server),
    ],
)
def test_two_processes_decide_what_one_decides(
    folder: Path, optimizer: dict[str, Any], shard: str
) -> None:
    """Through both stages, with accumulation, weights by size and clipping."""
    changes: dict[str, Any] = {
        "task": {"factory": "tests.tasks.digits:Digits", "reduction": "token_mean"},
        "launch": {"processes": 2, "shard": shard},
    }
    plan = plan_of(folder, f"{shard}-{optimizer['kind']}", optimizer, **changes)
    stages = [stage.model_copy(update={"accumulate": 5}) for stage in plan.stages]
    plan = plan.model_copy(update={"stages": stages})
    two = curate_small(plan)
    changes = {"run": f"one-for-{plan.run}", "launch": LaunchConfig()}
    one = curate_small(plan.model_copy(update=changes))
    for stage in (0, 1):
        assert ledger_distance(one, two, stage) < 1e-9
    assert read_decisions(one, 0)["keep"].equals(read_decisions(two, 0)["keep"])


@pytest.mark.server
@pytest.mark.parametrize("shard", ["none", "fsdp"])
def test_a_process_may_have_no_sample_of_a_batch(folder: Path, shard: str) -> None:
    """The last batch of an epoch has 2 samples for 3 processes. Curvature is compared too."""
    launch = LaunchConfig(processes=3, shard=shard)
    task = {"factory": "tests.tasks.ranks:NegatedDigits"}
    plan = plan_of(folder, f"few-{shard}", ADAMW, task=task)
    stages = [plan.stages[0].model_copy(update={"batch_size": 23})]
    plan = plan.model_copy(update={"stages": stages})
    one = Run.start(plan.model_copy(update={"run": f"one-for-{plan.run}"}))
    three = Run.start(plan)
    train_stage(INLINE, one.url, 0)
    train_stage(INLINE, three.url, 0, launch)
    assert ledger_distance(one, three) < 1e-9
    segment = read_segment(three.folder.stage(0).segment(0))
    torch.testing.assert_close(segment.fisher, -segment.contributions)


def slow_plan(folder: Path, name: str, launch: dict[str, Any], **changes: Any) -> Plan:
    return plan_of(
        folder,
        name,
        ADAMW,
        task={"factory": "tests.tasks.ranks:SlowDigits"},
        launch=launch,
        **changes,
    )


@pytest.mark.server
@pytest.mark.parametrize(
    ("rank", "segments", "then"),
    [(0, 1, {"processes": 3}), (1, 2, {"processes": 1}), (1, 0, {"processes": 2, "shard": "fsdp"})],
)
def test_a_killed_process_ends_the_stage_and_others_continue_it(
    folder: Path, rank: int, segments: int, then: dict[str, Any]
) -> None:
    whole = curate_small(slow_plan(folder, "whole", {}))
    plan = slow_plan(folder, f"killed-{rank}-{segments}", {"processes": 2})
    run = Run.start(plan)
    killer = kill_a_process(run, segments, 0.2, rank)
    sentence = f"process {rank} of the 2 that trained stage 0 of .* was ended by SIGKILL, often"
    with pytest.raises(SecateurError, match=sentence):
        train_stage(INLINE, run.url, 0)
    killer.join()
    assert find_processes(run) == []
    assert segments <= len(run.folder.stage(0).segments()) < 3
    # The run may continue with other processes than it began with.
    Run.start(plan.model_copy(update={"launch": LaunchConfig(**then)}))
    train_stage(INLINE, run.url, 0, LaunchConfig(**then))
    assert ledger_distance(whole, run) < 1e-9
    score_stage(INLINE, run.url, 0)
    prune_stage(INLINE, run.url, 0)
    assert read_decisions(whole, 0)["keep"].equals(read_decisions(run, 0)["keep"])


@pytest.mark.server
def test_an_error_in_one_process_is_the_error_of_the_stage(folder: Path) -> None:
    data = folder / "nan"
    data.mkdir()
    make_data(data, [sample(150, cls=b"nan")])
    run = Run.start(plan_of(data, "nan", SGD, launch={"processes": 2}))
    with pytest.raises(PlanError, match=r"the loss of sample digit-0150 is nan at step \d+ of"):
        train_stage(INLINE, run.url, 0)
    assert find_processes(run) == []


@pytest.mark.server
def test_an_interruption_ends_every_process(folder: Path) -> None:
    run = Run.start(slow_plan(folder, "interrupted", {"processes": 2}))
    list_samples_and_basis(run)
    steps = train_in_processes(run, 0, run.plan.launch, 0)
    assert next(steps) == 0
    assert len(find_processes(run)) == 3
    steps.close()  # as an exception in the thread that trains would do
    assert find_processes(run) == []
    assert find_stray_files(run.folder.root) == []


@pytest.mark.server
def test_a_killed_starter_leaves_no_process(folder: Path) -> None:
    run = Run.start(slow_plan(folder, "orphans", {"processes": 2}))
    list_samples_and_basis(run)
    code = "from secateur.tasks.run import Run; from secateur.tasks.training.train import "
    code += f"train_stage; train_stage(Run.open({run.url!r}), 0)"
    starter = subprocess.Popen([sys.executable, "-c", code])
    while not run.folder.stage(0).segments():
        time.sleep(0.05)
    starter.kill()
    starter.wait()
    deadline = time.monotonic() + 30
    while find_processes(run) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert find_processes(run) == []


@pytest.mark.server
def test_replay_repeats_the_random_draws_of_every_process(folder: Path) -> None:
    """Dropout draws other masks in each process; a replay in one process draws the same ones."""
    plan = plan_of(
        folder,
        "dropout",
        SGD,
        launch={"processes": 2},
        score={"estimate": "replay", "horizon": "stage", "aggregate": "mean"},
    )
    plan = plan.model_copy(
        update={
            "model": plan.model.model_copy(update={"args": {"dropout": 0.3}}),
            "stages": [plan.stages[0].model_copy(update={"accumulate": 5})],
        }
    )
    run = Run.start(plan)
    train_stage(INLINE, run.url, 0)
    loop = TrainingLoop(run, 0, read_stage_samples(run, 0))
    for number, steps in enumerate(segment_bounds(loop.schedule)):
        restore_segment_start(run, loop, 0, number)
        for step in steps:
            loop.step(step)
        stored = read_checkpoint(run.folder.stage(0).segment(number))
        for name, tensor in loop.capture_state().items():
            torch.testing.assert_close(tensor, stored[name], rtol=1e-9, atol=1e-12)
    score_stage(INLINE, run.url, 0)  # would be refused if a segment did not repeat itself


def list_samples_and_basis(run: Run) -> None:
    list_stage_samples(run, 0)
    fit_basis(run)


@pytest.mark.server
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("shard", ["none", "fsdp"])
def test_two_gpus_decide_what_one_decides(folder: Path, shard: str) -> None:
    """Over NCCL."""
    launch = {"processes": 2, "shard": shard}
    two = curate_small(plan_of(folder, f"gpus-{shard}", ADAMW, device="cuda", launch=launch))
    one = curate_small(plan_of(folder, f"gpu-{shard}", ADAMW, device="cuda"))
    assert ledger_distance(one, two) < 1e-9
    assert read_decisions(one, 0)["keep"].equals(read_decisions(two, 0)["keep"])

"""A trainer in another process, and a Prefect server whose worker prunes what it trained."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest
import webdataset

from secateur.errors import PlanError
from secateur.flows.trainers import wait_for_shards
from secateur.tasks.data.samples import read_stage_samples
from secateur.tasks.results.pruning_results import read_decisions
from secateur.tasks.results.training_results import TrainingResult
from secateur.tasks.run import Run
from secateur.tasks.training.segments import commit_training_result
from tests.flows.deployed import environment, make_project, wait_for
from tests.servers import free_ports
from tests.tasks.small import make_data, small_plan


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[Path, dict[str, str]]]:
    """A project's folder and environment. A server, a worker and the deployments run for it."""
    make_project(tmp_path)
    (port,) = free_ports(1)
    url = f"http://127.0.0.1:{port}/api"
    settings = environment(tmp_path, port) | {"PREFECT_API_URL": url, "PWD": str(tmp_path)}
    with ExitStack() as stack:

        def start(*command: str) -> None:
            log = stack.enter_context(open(tmp_path / f"{command[1]}.log", "wb"))
            process = subprocess.Popen(
                command, cwd=tmp_path, env=settings, stdout=log, stderr=log, start_new_session=True
            )
            stack.callback(process.wait)
            stack.callback(process.terminate)

        start("prefect", "server", "start")
        subprocess.run(
            [sys.executable, "-m", "examples.images.make_shards"],
            cwd=tmp_path,
            env=settings,
            check=True,
        )
        wait_for(lambda: is_healthy(url), 240, lambda: (tmp_path / "server.log").read_text())
        for command in (
            "work-pool create secateur --type process",
            "--no-prompt deploy --name on-stage-trained",
        ):
            subprocess.run(
                ["prefect", *command.split()],
                cwd=tmp_path,
                env=settings,
                check=True,
                capture_output=True,
            )
        start("prefect", "worker", "start", "--pool", "secateur")
        yield tmp_path, settings


def is_healthy(url: str) -> bool:
    """Return whether the server answers."""
    try:
        return httpx.get(f"{url}/health").is_success
    except httpx.HTTPError:
        return False


@pytest.mark.server
def test_a_trainer_in_another_process(served: tuple[Path, dict[str, str]]) -> None:
    folder, settings = served
    command = [sys.executable, "-m", "examples.outside.train"]
    stage = folder / "runs/outside/stages/00"
    with open(folder / "trainer.log", "wb") as log:
        doomed = subprocess.Popen(command, cwd=folder, env=settings, stdout=log, stderr=log)
        wait_for(
            (stage / "ledger/seg-00000/manifest.json").exists,
            240,
            lambda: (folder / "trainer.log").read_text(),
        )
        doomed.send_signal(signal.SIGKILL)
    assert doomed.wait() == -signal.SIGKILL
    assert not (stage / "trained").exists()
    done = subprocess.run(
        command, cwd=folder, env=settings, capture_output=True, text=True, timeout=900, check=False
    )
    assert done.returncode == 0, done.stderr
    assert re.search(r"stage 0 of \S+ continues at step (60|120|180)\n", done.stderr)
    assert "nothing was triggered" not in done.stderr
    run = Run.open(str(folder / "runs/outside"))
    kept = read_decisions(run, 0).filter("keep")["key"].to_list()
    shards = wait_for_shards(run.url, 0)
    assert len(kept) < 3840
    assert [s["__key__"] for s in webdataset.WebDataset(shards, shardshuffle=False)] == kept
    assert read_stage_samples(run, 1).frame["key"].to_list() == kept
    failure = wait_for_failed_pruning(folder, settings)
    assert re.search(r"flow run \S+ failed \(a shard is gone\)", failure)
    assert [run.folder.stage(n).trained.manifest.facts["by"] for n in (0, 1)] == ["outside"] * 2
    wait_for(
        lambda: run.folder.stage(1).scores.committed,
        240,
        lambda: (folder / "worker.log").read_text(),
    )


def wait_for_failed_pruning(folder: Path, settings: dict[str, str]) -> str:
    """Wait for shards that a failed flow run should have written, and return what is printed."""
    make_data(folder)
    run = Run.start(small_plan(folder, run="failed"))
    mark_trained(run)
    api = settings["PREFECT_API_URL"]
    flow = httpx.post(f"{api}/flows/", json={"name": "prune"}).json()["id"]
    state = {"type": "FAILED", "message": "a shard is gone"}
    made = httpx.post(
        f"{api}/flow_runs/",
        json={"flow_id": flow, "name": f"prune {run.url} stage 0", "state": state},
    )
    assert made.is_success, made.text
    call = f"wait_for_shards({run.url!r}, 0, timeout=0)"
    command = [sys.executable, "-c", f"from secateur import wait_for_shards; {call}"]
    return subprocess.run(
        command, cwd=folder, env=settings, capture_output=True, text=True, check=False
    ).stderr


def mark_trained(run: Run) -> None:
    """Commit what another trainer would have left of the first stage."""
    with run.folder.stage(0).segment(0).attempt("segment", {}):
        pass
    commit_training_result(
        run, TrainingResult(stage=0, samples=140, steps=4, segments=1, by="outside")
    )


@pytest.fixture
def small(tmp_path: Path) -> Path:
    make_data(tmp_path)
    return tmp_path


def test_waiting_says_why_no_shards_come(small: Path) -> None:
    """The stage is not trained, not pruned, refused by a gate, or has no policy."""
    trial = {"trial": {"steps": 1, "draws": 1}, "otherwise": "fail"}
    stages = [{"steps": 4, "batch_size": 20, "prune": {"policy": "top", "keep": 0.5}}]
    plan = small_plan(small, trust=trial, stages=stages)
    run = Run.start(plan)
    expected = "is not trained yet and was not pruned in 0 s; check whether a Prefect worker"
    with pytest.raises(PlanError, match=expected):
        wait_for_shards(run.url, 0, timeout=0)
    with pytest.raises(PlanError, match="does not prune a stage 1"):
        wait_for_shards(run.url, 1, timeout=0)
    mark_trained(run)
    with pytest.raises(PlanError, match="is trained and was not pruned in 0 s"):
        wait_for_shards(run.url, 0, timeout=0)
    with run.folder.stage(0).trial("plan").attempt("trial", {}) as attempt:
        attempt.facts.update(kept=2.0, random=[1.0, 1.5])
    expected = (
        r"is not pruned: the trial's loss is 2\.0000 on the samples that are kept and 1\.2500 on "
        r"random ones"
    )
    with pytest.raises(PlanError, match=expected):
        wait_for_shards(run.url, 0)

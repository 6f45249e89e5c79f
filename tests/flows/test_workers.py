"""The kind of workers does not change a run: threads, processes, Dask, Ray write the same bytes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ParamSpec, TypeVar

import dask
import numpy as np
import polars as pl
import pytest
from pydantic import TypeAdapter

from secateur.errors import PlanError
from secateur.flows.pipeline_tasks import rewrite_shard
from secateur.flows.stage import analyze_stage, audit_stage, prune_stage, score_stage
from secateur.flows.workers import Call, InlineWorkers, WorkerPool, worker_pool
from secateur.storage.attempt import Attempt
from secateur.storage.folder import Folder
from secateur.storage.layout import PLAN_PRUNING
from secateur.storage.outputs import Output
from secateur.storage.rewrite import rewrite_shard as write_kept_members
from secateur.tasks.engine.pipeline_task import PipelineTask
from secateur.tasks.engine.ui_artifacts import ProgressArtifact
from secateur.tasks.plan import WorkersConfig
from secateur.tasks.plan.plan_file import parse_plan, plan_text
from secateur.tasks.pruning import prune
from secateur.tasks.pruning.policies import RandomPolicy
from secateur.tasks.run import Run
from tests.servers import free_ports
from tests.tasks.small import curate_small, make_data, small_plan

P = ParamSpec("P")
R = TypeVar("R")

CHANGES: dict[str, Any] = {
    "score": {"horizon": "stage", "aggregate": "mean"},
    "audit": {"removals": 4, "stages": [0]},
    "stages": [{"steps": 8, "batch_size": 20, "prune": {"policy": "top", "keep": 0.5}}],
    "segment_steps": 4,
}
RUN_ALL = """
import sys
from secateur.tasks.engine.prefect_server import prefect_server
from secateur.tasks.plan.plan_file import read_plan

if __name__ == "__main__":
    with prefect_server():
        from secateur.flows.curate import curate
        for path in sys.argv[1:]:
            curate(read_plan(path))
"""
SLEEP = """
import sys
from prefect import flow
from secateur.flows.workers import Call, worker_pool
from secateur.tasks.engine.prefect_server import prefect_server
from secateur.tasks.plan import WorkersConfig
from tests.flows.sleeping import sleep

if __name__ == "__main__":
    kind, run_url, *marks = sys.argv[1:]
    with prefect_server():
        @flow
        def wait():
            with worker_pool(WorkersConfig(kind=kind, count=2)) as workers:
                workers.map([Call(sleep, (run_url, mark)) for mark in marks], "sleeping")
        wait()
"""


class InlineProcesses(InlineWorkers):
    """Two workers that are this process. They note the tasks and arguments that they are given."""

    count = 2
    kind = "processes"

    def __init__(self) -> None:
        self.calls: list[tuple[str, str]] = []

    def call(self, task: PipelineTask[P, R], run_url: str, *args: P.args, **kwargs: P.kwargs) -> R:
        values = TypeAdapter(Any).dump_json([[run_url, *args], kwargs])
        self.calls.append((task.name, values.decode()))
        return super().call(task, run_url, *args, **kwargs)

    def map(
        self, calls: Sequence[Call], label: str, progress: ProgressArtifact | None = None
    ) -> None:
        # Tasks that do not depend on one another may run in any order.
        for call in reversed(calls):
            self.call(call.task, *call.arguments)


def two_targets(folder: Path) -> dict[str, Any]:
    shards = {"shards": f"{folder}/target-0.tar"}
    return {"targets": {"clean": shards, "other": shards}, **CHANGES}


def content(run: Run) -> dict[str, str]:
    """Return every file's hash and every output's facts.

    Facts that name the run's own folder or the seconds taken are left out, and so are profile and
    report, which only some of these runs write.
    """
    content = {}
    root = Folder(run.url)
    for name in root.files():
        if not name.endswith("manifest.json") or name.startswith("plan/"):
            continue
        folder = name.removesuffix("/manifest.json")
        manifest = Output(root.child(folder)).manifest
        facts = {key: value for key, value in manifest.facts.items() if key != "seconds"}
        content[folder] = json.dumps(facts, sort_keys=True).replace(run.url, "")
        for file, file_facts in manifest.files.items():
            content[f"{folder}/{file}"] = file_facts["sha256"]
    not_compared = ("stages/00/profile", "stages/00/report")
    return {name: value for name, value in content.items() if not name.startswith(not_compared)}


def write_workers_plan(folder: Path, kind: str) -> str:
    """Write a plan with two workers of a kind, and return its path."""
    plan = small_plan(folder, run=kind, workers={"kind": kind, "count": 2}, **two_targets(folder))
    path = folder / f"{kind}.yaml"
    path.write_text(plan_text(plan))
    return str(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("workers")
    make_data(made)
    return made


@pytest.fixture(scope="module")
def serial(folder: Path) -> Run:
    return curate_small(small_plan(folder, run="serial", **two_targets(folder)))


def remove_results(run: Run) -> None:
    """Remove everything that is derived from the trained first stage."""
    stage = run.folder.stage(0)
    for output in (
        stage.embeddings,
        stage.index,
        stage.targets,
        stage.scores,
        stage.profile,
        stage.prune(PLAN_PRUNING),
        stage.audit(4),
        stage.agreement,
    ):
        output.remove()
    for name in ("replay", "removals"):
        stage.root.child(name).delete()


def test_parts_in_any_order_write_what_the_serial_run_wrote(folder: Path) -> None:
    changes = {**two_targets(folder), "trust": {"questions": 3}}
    run = curate_small(small_plan(folder, run="parts", **changes))
    before = content(run)
    workers = InlineProcesses()
    remove_results(run)
    score_stage(workers, run.url, 0)
    analyze_stage(workers, run.url, 0)
    audit_stage(workers, run.url, 0)
    prune_stage(workers, run.url, 0)
    assert content(run) == before
    names = [name for name, _ in workers.calls]
    assert {name: names.count(name) for name in set(names)} == {
        "embed": 2,
        "compose embeddings": 1,
        "index": 1,
        "differentiate targets": 1,
        "score": 1,
        "profile": 1,
        "replay questions": 2,
        "measure agreement": 1,
        "replay": 2,
        "retrain without a sample": 4,
        "audit": 2,
        "decide": 1,
        "rewrite shard": 2,
        "prune": 1,
    }
    # Only URLs and small values pass between processes.
    assert max(len(arguments) for _, arguments in workers.calls) < 500


def test_shards_that_were_written_before_an_interruption_are_kept(
    serial: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = serial.folder.stage(0)
    policy = RandomPolicy(keep=0.5)
    rewritten_numbers = []

    def rewrite_and_note(
        attempt: Attempt, urls: Sequence[str], number: int, frame: pl.DataFrame, keep: np.ndarray
    ) -> list[str]:
        rewritten_numbers.append(number)
        return write_kept_members(attempt, urls, number, frame, keep)

    shards = prune.decide_stage(serial, 0, policy)
    prune.rewrite_kept_shard(serial, 0, "random-0.5", 0)
    assert stage.rewritten("random-0.5", 0).fingerprint
    monkeypatch.setattr(prune, "rewrite_shard", rewrite_and_note)
    result = prune.write_pruned_stage(serial, 0, policy)
    assert (shards, rewritten_numbers, len(result.shards)) == (2, [1], 2)
    assert not stage.rewritten("random-0.5", 0).committed
    assert not stage.decided("random-0.5").committed

    # Parts that were made from other scores are made again.
    stage.prune("random-0.5").remove()
    prune.decide_stage(serial, 0, policy)
    prune.rewrite_kept_shard(serial, 0, "random-0.5", 0)
    stage.decided("random-0.5").remove()
    with stage.decided("random-0.5").attempt("decisions", {"scores": "other"}) as attempt:
        attempt.write("decisions.parquet", b"")
    rewritten_numbers.clear()
    assert prune.write_pruned_stage(serial, 0, policy).kept == result.kept
    assert stage.prune("random-0.5").committed


def test_a_run_continues_with_other_workers_but_not_with_another_plan(
    folder: Path, serial: Run
) -> None:
    plan = small_plan(
        folder,
        run="serial",
        workers={"kind": "dask", "address": "tcp://127.0.0.1:1"},
        **two_targets(folder),
    )
    assert Run.start(plan).url == serial.url
    with pytest.raises(PlanError, match="they differ in seed"):
        Run.start(plan.model_copy(update={"seed": 1}))


@pytest.mark.parametrize(
    ("workers", "expected"),
    [
        (
            {"kind": "threads", "address": "tcp://a:1"},
            "`address` names a Dask scheduler or a Ray cluster, and `kind` is threads",
        ),
        (
            {"kind": "dask", "address": "tcp://a:1", "count": 2},
            "decides how many workers there are; leave `count` out",
        ),
        ({"kind": "slurm"}, "workers.kind"),
        ({"count": 0}, "workers.count"),
        ({"timeout": 0}, "workers.timeout"),
    ],
)
def test_impossible_workers_are_refused(
    folder: Path, workers: dict[str, Any], expected: str
) -> None:
    text = plan_text(small_plan(folder))
    with pytest.raises(PlanError, match="plan") as raised:
        parse_plan(text, "plan", {"workers": workers})
    assert expected in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("kind", ["dask", "ray"])
def test_a_missing_extra_is_a_sentence(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    calls = [Call(rewrite_shard, ("runs/any", 0, "plan", number)) for number in range(2)]
    config = WorkersConfig.model_validate({"kind": kind, "count": 2})
    with (
        worker_pool(config) as workers,
        pytest.raises(PlanError, match=rf"pip install secateur\[{kind}\]"),
    ):
        workers.map(calls, "rewriting")


def test_workers_that_cannot_be_reached_are_a_sentence() -> None:
    (port,) = free_ports(1)
    calls = [Call(rewrite_shard, ("runs/any", 0, "plan", number)) for number in range(2)]
    with (
        dask.config.set({"distributed.comm.timeouts.connect": "1s"}),
        worker_pool(WorkersConfig(kind="dask", address=f"tcp://127.0.0.1:{port}")) as workers,
        pytest.raises(
            PlanError, match=rf"the dask workers at tcp://127.0.0.1:{port} cannot be reached"
        ),
    ):
        workers.map(calls, "rewriting")


def start_script(path: Path, *words: str) -> subprocess.Popen[str]:
    """Start a Python script without the Prefect settings of the tests."""
    clean = {
        k: v for k, v in os.environ.items() if not k.startswith("PREFECT_") or k == "PREFECT_HOME"
    }
    quiet = {
        "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    }
    return subprocess.Popen(
        [sys.executable, str(path), *words], env=clean | quiet, stderr=subprocess.PIPE, text=True
    )


@pytest.mark.server
def test_every_kind_writes_the_same_bytes(folder: Path, serial: Run) -> None:
    kinds = ["threads", "processes", "dask", "ray"]
    script = folder / "all.py"
    script.write_text(RUN_ALL)
    process = start_script(script, *(write_workers_plan(folder, kind) for kind in kinds))
    _, errors = process.communicate(timeout=1800)
    assert process.returncode == 0, errors
    expected = content(serial)
    for kind in kinds:
        assert content(Run.open(f"{folder}/runs/{kind}")) == expected, kind


@pytest.mark.server
@pytest.mark.parametrize("kind", ["threads", "processes"])
def test_workers_end_with_the_flow_run_that_is_cancelled(tmp_path: Path, kind: str) -> None:
    """A Prefect worker sends SIGTERM to a flow run that is cancelled."""
    make_data(tmp_path)
    run = Run.start(small_plan(tmp_path))
    script = tmp_path / "sleep.py"
    script.write_text(SLEEP)
    marks = [tmp_path / str(number) for number in range(2)]
    with start_script(script, kind, run.url, *map(str, marks)) as process:
        try:
            end = time.monotonic() + 900
            while not all(mark.exists() and mark.read_text() for mark in marks):
                assert process.poll() is None
                assert time.monotonic() < end
                time.sleep(0.1)
            process.send_signal(signal.SIGTERM)
            start = time.monotonic()
            process.communicate(timeout=120)
        finally:
            process.kill()
    assert process.returncode != 0
    # The tasks would take 600 seconds.
    assert time.monotonic() - start < 60
    for mark in marks:
        assert not Path(f"/proc/{mark.read_text()}").exists()


@pytest.mark.parametrize("own", [False, True])
def test_a_task_that_ends_together_with_a_turn_of_waiting_is_waited_for(own: bool) -> None:
    """Its state is final by then. That was taken for the task's timeout, and ended Dask's flows."""

    def result(timeout: float | None = None) -> str:
        if timeout is not None or own:
            raise TimeoutError
        return "done"

    future = SimpleNamespace(result=result, state=SimpleNamespace(is_final=lambda: True))
    workers = WorkerPool(WorkersConfig())
    workers._submit = lambda call: future  # type: ignore[method-assign]
    calls = [Call(rewrite_shard, ("run", 0, PLAN_PRUNING, number)) for number in range(2)]
    with pytest.raises(TimeoutError) if own else nullcontext():
        workers.map(calls, "waiting")

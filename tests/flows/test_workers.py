"""What carries out a run changes nothing of it: threads, processes, Dask and Ray leave the same bytes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import dask
import pytest

from secateur.errors import PlanError
from secateur.flows.stage import audit_stage, prune_stage, score_stage
from secateur.flows.workers import Call, WorkerPool, worker_pool
from secateur.storage.folder import Folder
from secateur.storage.outputs import Output
from secateur.tasks.plan import WorkersConfig
from secateur.tasks.plan.plan_file import parse_plan, plan_text
from secateur.tasks.pruning.prune import PLAN_PRUNING, rewrite_shard
from secateur.tasks.run.run import Run
from tests.servers import free_ports
from tests.tasks.small import curate_small, make_data, small_plan

CHANGES: dict[str, Any] = {
    "score": {"horizon": "stage", "aggregate": "mean"},
    "audit": {"removals": 4, "stages": [0]},
    "stages": [{"steps": 8, "batch_size": 20, "prune": {"policy": "top", "keep": 0.5}}],
    "segment_steps": 4,
}
RUN_ALL = """
import sys
from flows.server import some_server
from tasks.reading import read_plan

if __name__ == "__main__":
    with some_server():
        from flows.curate import curate
        for path in sys.argv[1:]:
            curate(read_plan(path))
"""
SLEEP = """
import sys, time
from prefect import flow
from flows.server import some_server
from flows.workers import Call, crew
from tasks.plan import Workers
from tests.flows.sleeping import sleeping

if __name__ == "__main__":
    with some_server():
        @flow
        def waiting():
            with crew(Workers(kind=sys.argv[1], count=2)) as workers:
                workers.together([Call(sleeping, (f"{sys.argv[2]}/{n}",)) for n in range(2)], "sleeping")
        waiting()
"""


class Watched(WorkerPool):
    """Two workers that are this process, and what they were given."""

    def __init__(self) -> None:
        super().__init__(WorkersConfig(kind="processes", count=2))
        self.given: list[tuple[str, str]] = []

    def call(self, task: Any, *args: Any, **kwargs: Any) -> Any:
        self.given.append((task.name, json.dumps([args, kwargs])))
        return task.fn(*args, **kwargs)

    def map(self, calls: Any, label: str, live: Any = None) -> None:
        for one in reversed(calls):  # any order does
            self.call(one.task, *one.arguments)


def two_targets(folder: Path) -> dict[str, Any]:
    shards = {"shards": f"{folder}/target-0.tar"}
    return {"targets": {"clean": shards, "other": shards}, **CHANGES}


def content(run: Run) -> dict[str, str]:
    """Every file's hash and every artefact's facts, but for what names the run's own folder or workers."""
    found = {}
    root = Folder(run.url)
    for name in root.files():
        if name.endswith("manifest.json") and not name.startswith("plan/"):
            folder = name.removesuffix("/manifest.json")
            manifest = Output(root.child(folder)).manifest
            facts = {name: value for name, value in manifest.facts.items() if name != "seconds"}
            found[folder] = json.dumps(facts, sort_keys=True).replace(run.url, "")
            found |= {f"{folder}/{file}": facts["sha256"] for file, facts in manifest.files.items()}
    own = ("stages/00/profile", "stages/00/report")
    return {name: value for name, value in found.items() if not name.startswith(own)}


def told(folder: Path, kind: str) -> str:
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


def strip(run: Run) -> None:
    """Removes everything that is made of the trained first stage."""
    own = run.folder.stage(0)
    for artefact in (
        own.embeddings,
        own.index,
        own.targets,
        own.scores,
        own.profile,
        own.prune(PLAN_PRUNING),
        own.audit(4),
    ):
        artefact.remove()
    for name in ("replay", "removals"):
        own.root.child(name).delete()


def test_parts_in_any_order_are_the_serial_run(folder: Path) -> None:
    run = curate_small(small_plan(folder, run="parts", **two_targets(folder)))
    before, workers = content(run), Watched()
    strip(run)
    score_stage(workers, run.url, 0)
    audit_stage(workers, run.url, 0)
    prune_stage(workers, run.url, 0)
    assert content(run) == before
    names = [name for name, _ in workers.given]
    assert {n: names.count(n) for n in set(names)} == {
        "embed segment": 2, "compose embeddings": 1, "index": 1, "differentiate targets": 1, "score": 1, "profile": 1, "replay": 2,
        "retrain without a sample": 4, "audit": 2, "decide": 1, "rewrite shard": 2, "prune": 1,
    }  # fmt: skip
    assert max(len(arguments) for _, arguments in workers.given) < 500  # URLs and small values


def test_shards_that_were_written_before_an_interruption_are_kept(
    serial: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, policy = serial.folder.stage(0), {"policy": "random", "keep": 0.5}
    from secateur.tasks.pruning import prune

    decided = prune.decide_stage.fn(serial.url, 0, policy)
    rewrite_shard.fn(serial.url, 0, "random-0.5", 0)
    kept = own.rewritten("random-0.5", 0).fingerprint
    writes = []
    whole = prune.rewritten
    monkeypatch.setattr(prune, "rewritten", lambda *args: writes.append(args[2]) or whole(*args))
    found = prune.write_pruned_stage.fn(serial.url, 0, policy)
    assert (decided, writes, len(found.shards)) == (2, [1], 2)
    assert not own.rewritten("random-0.5", 0).committed
    assert not own.decided("random-0.5").committed
    assert kept

    own.prune("random-0.5").remove()  # what is left of other scores is not taken
    prune.decide_stage.fn(serial.url, 0, policy)
    rewrite_shard.fn(serial.url, 0, "random-0.5", 0)
    with own.decided("random-0.5").attempt("other", {}):
        pass
    own.decided("random-0.5").remove()
    with own.decided("random-0.5").attempt("decisions", {"scores": "other"}) as attempt:
        attempt.write("decisions.parquet", b"")
    writes.clear()
    assert prune.write_pruned_stage.fn(serial.url, 0, policy).kept == found.kept
    assert own.prune("random-0.5").committed


def test_a_run_goes_on_with_other_workers_and_not_with_another_plan(
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
            "`address` is a Dask scheduler's or a Ray cluster's, and `kind` is",
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
def test_workers_that_cannot_be(folder: Path, workers: dict[str, Any], expected: str) -> None:
    text = plan_text(small_plan(folder))
    with pytest.raises(PlanError, match="plan") as raised:
        parse_plan(text, "plan", {"workers": workers})
    assert expected in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("kind", ["dask", "ray"])
def test_a_missing_extra_is_a_sentence(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    calls = [Call(rewrite_shard, ("runs/any", 0, "plan", number)) for number in range(2)]
    with (
        worker_pool(WorkersConfig(kind=kind, count=2)) as workers,
        pytest.raises(PlanError, match=rf"pip install secateur\[{kind}\]"),
    ):  # type: ignore[arg-type]
        workers.map(calls, "rewriting")


def test_workers_that_are_not_there_are_a_sentence() -> None:
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


def started(code: str, *words: str) -> subprocess.Popen[str]:
    clean = {
        k: v for k, v in os.environ.items() if not k.startswith("PREFECT_") or k == "PREFECT_HOME"
    }
    quiet = {
        "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    }
    return subprocess.Popen(
        [sys.executable, code, *words], env=clean | quiet, stderr=subprocess.PIPE, text=True
    )


@pytest.mark.server
def test_every_kind_leaves_the_same_bytes(folder: Path, serial: Run) -> None:
    kinds = ["threads", "processes", "dask", "ray"]
    script = folder / "all.py"
    script.write_text(RUN_ALL)
    process = started(str(script), *(told(folder, kind) for kind in kinds))
    _, errors = process.communicate(timeout=1800)
    assert process.returncode == 0, errors
    expected = content(serial)
    for kind in kinds:
        assert content(Run.open(f"{folder}/runs/{kind}")) == expected, kind


@pytest.mark.server
@pytest.mark.parametrize("kind", ["threads", "processes"])
def test_workers_end_with_the_flow_run_that_is_cancelled(tmp_path: Path, kind: str) -> None:
    """SIGTERM is what a Prefect worker sends to a flow run that is cancelled."""
    script = tmp_path / "sleep.py"
    script.write_text(SLEEP)
    marks = [tmp_path / str(number) for number in range(2)]
    with started(str(script), kind, str(tmp_path)) as process:
        try:
            end = time.monotonic() + 900
            while not all(mark.exists() and mark.read_text() for mark in marks):
                assert process.poll() is None
                assert time.monotonic() < end
                time.sleep(0.1)
            process.send_signal(signal.SIGTERM)
            begun = time.monotonic()
            process.communicate(timeout=120)
        finally:
            process.kill()
    assert process.returncode != 0
    assert time.monotonic() - begun < 60  # of the 600 that they would take
    for mark in marks:
        assert not Path(f"/proc/{mark.read_text()}").exists()  # the process that carried it out


@pytest.mark.parametrize("own", [False, True])
def test_a_task_that_ends_as_its_turn_of_waiting_does_is_waited_for(own: bool) -> None:
    """Its state is final by then: that was taken for a timeout of the task's own, and ended flows on Dask."""

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

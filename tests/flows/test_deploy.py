"""docs/deploy.md runs, and its deployments work: on schedule, on events, on demand, after kills."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psutil
import pytest

from secateur.flows.events import NAMES
from secateur.flows.run_lock import limit_name
from secateur.flows.stage import train_stage
from secateur.flows.workers import InlineWorkers
from secateur.storage.layout import RunFolder
from secateur.tasks.run import Run
from tests.flows.deployed import PATIENCE, Deployed, deploy, wait_for
from tests.servers import PostgreSQL, SeaweedFS
from tests.tasks.small import make_data, small_plan, values

SLOTS = ("prefect.concurrency-limit.acquired", "prefect.concurrency-limit.released")

pytestmark = pytest.mark.server


@pytest.fixture(scope="module")
def database() -> Iterator[PostgreSQL]:
    server = PostgreSQL()
    try:
        server.start()
        yield server
    finally:
        server.kill()


@pytest.fixture(scope="module")
def project(
    database: PostgreSQL, seaweed_server: SeaweedFS, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Deployed]:
    """The page's folder after its first part: server, worker, deployments and a first run."""
    started = deploy(tmp_path_factory.mktemp("project"), database, seaweed_server)
    try:
        assert started.shell
        started.shell.part(started.shell.titles[0])
        yield started
    finally:
        if started.shell:
            started.shell.close()
        started.client.close()


@pytest.fixture(scope="module")
def doomed(project: Deployed) -> dict[str, Any]:
    """A flow run whose worker and process were both killed while it trained.

    It has a work pool for itself.
    """
    make_data(project.folder / "doomed")
    plan = values(
        project.folder / "doomed",
        run="doomed",
        stages=[{"steps": 4000, "batch_size": 20}],
        segment_steps=500,
    )
    with worker(project, "doomed") as process:
        wait_for(
            lambda: bool(
                project.post("/work_pools/filter", work_pools={"name": {"any_": ["doomed"]}})
            ),
            PATIENCE,
            lambda: "",
        )
        deployment = project.copy(
            "curate/nightly", name="doomed", work_pool_name="doomed", parameters={"plan": plan}
        )
        identity = project.start(deployment)
        ledger = project.folder / "doomed/runs/doomed/stages/00/ledger/seg-00001/manifest.json"
        wait_for(ledger.exists, PATIENCE, lambda: project.logs(identity))
        for victim in (process, *psutil.Process(process.pid).children(recursive=True)):
            victim.send_signal(signal.SIGKILL)
    stage = RunFolder(f"{project.folder}/doomed/runs/doomed").stage(0)
    return {
        "deployment": deployment,
        "flow_run": identity,
        "attempts": [segment.manifest.attempt for segment in stage.segments()],
    }


def test_the_three_deployments(project: Deployed) -> None:
    nightly = project.deployment("curate/nightly")
    assert nightly["schedules"][0]["schedule"] == {
        "cron": "0 3 * * *",
        "timezone": "UTC",
        "day_or": True,
    }
    assert nightly["global_concurrency_limit"]["limit"] == 1
    assert nightly["parameters"]["plan"]["run"] == "images"
    form = nightly["parameter_openapi_schema"]
    assert form["definitions"]["Plan"]["properties"]["segment_steps"]["description"]
    assert project.deployment("prune/on-stage-trained")["parameter_openapi_schema"]["required"] == [
        "run",
        "stage",
    ]
    assert project.deployment("query/on-demand")["parameter_openapi_schema"]["required"] == ["run"]
    refused = project.client.post(
        f"/deployments/{nightly['id']}/create_flow_run",
        json={"parameters": {"plan": {"run": "x", "stages": []}}},
    )
    assert refused.status_code == 409


def test_the_first_runs_complete_and_emit_events(project: Deployed) -> None:
    (nightly,) = (
        r for r in project.flow_runs(project.deployment("curate/nightly")) if r["start_time"]
    )
    (query,) = project.flow_runs(project.deployment("query/on-demand"))
    assert (nightly["state"]["type"], query["state"]["type"]) == ("COMPLETED", "COMPLETED")
    folder = project.folder / "runs/images"
    names = ["trained", "embedded", "indexed", "pruned", "trained", "embedded", "indexed"]
    expected = [f"secateur.stage.{name}" for name in names] + ["secateur.run.finished"]
    wait_for(
        lambda: len(project.events()) >= len(expected), PATIENCE, lambda: str(project.events())
    )
    events = project.events()
    assert [event["event"] for event in events] == expected
    models = {name: model for model, name in NAMES.items()}
    for event in events:
        payload = models[event["event"]].model_validate(event["payload"])
        assert set(event["payload"]) == set(type(payload).model_fields)
        assert payload.run == str(folder)
        kind = "curate" if event["event"] == "secateur.stage.trained" else "run"
        assert event["resource"]["prefect.resource.id"] == f"secateur.{kind}.images"
    pruned = RunFolder(str(folder)).stage(0).prune("plan")
    shards = [Path(pruned.url(name)) for name in pruned.names() if name.startswith("shards/")]
    assert {shard.parent for shard in shards} == {Path(events[3]["payload"]["folder"])}
    assert events[3]["payload"]["shards"] == len(shards)
    assert project.flow_runs(project.deployment("prune/on-stage-trained")) == []


def test_a_schedule_fires(project: Deployed, doomed: dict[str, Any]) -> None:
    moment = datetime.now(UTC) + timedelta(seconds=8)
    daily = {"interval": 86_400, "anchor_date": moment.isoformat()}
    make_data(project.folder / "daily")
    deployment = project.copy(
        "curate/nightly", name="soon", schedules=[{"schedule": daily, "active": True}],
        parameters={"plan": values(project.folder / "daily"), "dated": True},
    )  # fmt: skip
    wait_for(lambda: bool(project.flow_runs(deployment)), PATIENCE, lambda: "nothing was scheduled")
    first = min(project.flow_runs(deployment), key=lambda run: run["expected_start_time"])
    assert first["auto_scheduled"]
    assert project.wait_for_state(first["id"])["type"] == "COMPLETED"
    run = Run.open(f"{project.folder}/daily/runs/small-{moment:%Y-%m-%d-%H%M}")
    assert run.folder.stage(0).prune("plan").committed


def test_events_that_come_twice_early_or_late(project: Deployed) -> None:
    make_data(project.folder / "outside")
    run = Run.start(small_plan(project.folder / "outside", run="outside"))
    train_next(run, 0)
    deployment = project.deployment("prune/on-stage-trained")
    for stage in (1, 0, 0):
        project.emit(stage, Path(run.url))
    wait_for(
        lambda: len(project.flow_runs(deployment)) == 3,
        PATIENCE,
        lambda: "an event was not answered",
    )
    ends = {one["id"]: project.wait_for_state(one["id"]) for one in project.flow_runs(deployment)}
    for one in project.flow_runs(deployment):
        assert ends[one["id"]]["type"] == ("FAILED" if one["parameters"]["stage"] else "COMPLETED")
        assert (
            one["parameters"]["stage"] == 0
            or "is not trained to its end" in ends[one["id"]]["message"]
        )
    pruned_events = project.events("secateur.stage.pruned")
    own = [event for event in pruned_events if event["payload"]["run"] == run.url]
    assert len(own) == 1  # both flow runs emit it, under one id
    wait_for(
        lambda: len(slots_of(project, run)) == 4, PATIENCE, lambda: str(slots_of(project, run))
    )
    assert slots_of(project, run) == ["acquired", "released"] * 2

    train_next(run, 1)
    pruned = run.folder.stage(0).prune("plan")
    shards = {name: pruned.manifest.files[name] for name in pruned.names()}
    pruned.remove()  # as if stage 0's event had been lost
    project.emit(1, Path(run.url))
    wait_for(
        lambda: bool(new_runs(project, set(ends))), PATIENCE, lambda: "an event was not answered"
    )
    assert project.wait_for_state(*new_runs(project, set(ends)))["type"] == "COMPLETED"
    again = Run.open(run.url).folder
    assert {name: again.stage(0).prune("plan").manifest.files[name] for name in shards} == shards
    assert again.stage(1).index.committed


def test_a_run_whose_worker_and_process_are_killed_crashes_and_continues(
    project: Deployed, doomed: dict[str, Any]
) -> None:
    again = project.start(doomed["deployment"])
    state = project.wait_for_state(doomed["flow_run"])
    assert (state["type"], state["message"]) == (
        "CRASHED",
        "The flow run sent no heartbeat for a minute, so its process has probably ended.",
    )
    with worker(project, "doomed"):
        assert project.wait_for_state(again)["type"] == "COMPLETED"
    stage = RunFolder(f"{project.folder}/doomed/runs/doomed").stage(0)
    attempts = [segment.manifest.attempt for segment in stage.segments()]
    assert (len(attempts), attempts[: len(doomed["attempts"])]) == (8, doomed["attempts"])


def test_the_rest_of_the_page(project: Deployed) -> None:
    assert project.shell
    _, own, together, real = project.shell.titles
    before = {run["id"] for run in project.flow_runs(project.deployment("prune/on-stage-trained"))}
    project.shell.part(own)
    wait_for(
        lambda: bool(new_runs(project, before)), PATIENCE, lambda: "the event was not answered"
    )
    assert project.wait_for_state(*new_runs(project, before))["type"] == "COMPLETED"
    project.shell.part(together)
    project.shell.part(real)
    assert "every file is as it was committed" in (project.folder / "page.log").read_text()


def train_next(run: Run, stage: int) -> None:
    """Train a stage, and do nothing else to it."""
    train_stage(InlineWorkers(), run.url, stage)


def slots_of(project: Deployed, run: Run) -> list[str]:
    """Return whether a run's slot was `acquired` or `released`, in the order of time."""
    events = [
        e
        for e in project.events(*SLOTS)
        if e["resource"]["prefect.resource.name"] == limit_name(run)
    ]
    return [event["event"].rpartition(".")[2] for event in events]


def new_runs(project: Deployed, before: set[str]) -> list[str]:
    """Return the ids of the flow runs of `prune` that are not in `before`."""
    return [
        r["id"]
        for r in project.flow_runs(project.deployment("prune/on-stage-trained"))
        if r["id"] not in before
    ]


@contextmanager
def worker(project: Deployed, pool: str) -> Iterator[subprocess.Popen[bytes]]:
    """A worker of a new work pool."""
    words = [
        sys.executable,
        "-m",
        "prefect",
        "worker",
        "start",
        "--pool",
        pool,
        "--type",
        "process",
    ]
    with open(project.folder / f"{pool}.log", "ab") as log:
        process = subprocess.Popen(
            words, cwd=project.folder, env=project.environment, stdout=log, stderr=log
        )
    try:
        yield process
    finally:
        process.terminate()
        process.wait(PATIENCE)

"""A run on a real Prefect server: what the server stores, and what a termination leaves."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from secateur.storage.layout import RunFolder
from tests.servers import free_ports
from tests.tasks.small import make_data, sample, values

HOSTILE = "<script>alert(1)<\u2215script>|[a](javascript:b)"
STAGES = [
    {"steps": 400, "batch_size": 20, "prune": {"policy": "top", "keep": 0.5}},
    {"steps": 5, "batch_size": 20},
]

KINDS = {
    "": "table",
    "-profile": "image",
    "-samples": "markdown",
    "-report": "markdown",
    "-training": "progress",
    "-embedding": "progress",
}
CACHED = {
    "list samples",
    "fit basis",
    "train",
    "compose embeddings",
    "index",
    "differentiate targets",
    "score",
    "profile",
    "prune",
    "report",
}

pytestmark = pytest.mark.server


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """A Prefect server's API."""
    (port,) = free_ports(1)
    home = tmp_path_factory.mktemp("home")
    clean = {k: v for k, v in os.environ.items() if not k.startswith("PREFECT_")} | {
        "PREFECT_HOME": str(home)
    }
    command = [sys.executable, "-m", "prefect", "server", "start", "--no-ui", "--port", str(port)]
    with (
        open(home / "log", "wb") as log,
        subprocess.Popen(
            command, env=clean, stdout=log, stderr=log, start_new_session=True
        ) as process,
        httpx.Client(base_url=f"http://127.0.0.1:{port}/api", timeout=60) as client,
    ):
        try:
            wait_for(lambda: is_healthy(client))
            yield client
        finally:
            os.killpg(process.pid, signal.SIGTERM)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("watched")
    make_data(made, [sample(150) | {"__key__": HOSTILE, "txt": HOSTILE.encode()}])
    (made / "train-2.tar").write_bytes(b"no tar")
    return made


def is_healthy(client: httpx.Client) -> bool:
    """Return whether the server answers."""
    try:
        return client.get("/health").is_success
    except httpx.HTTPError:
        return False


def wait_for(holds: Callable[[], bool], seconds: float = 900) -> None:
    """Wait until a condition holds."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.2)


def start(server: httpx.Client, folder: Path) -> subprocess.Popen[str]:
    """Start the command line with this server configured."""
    plan = folder / "watched.yaml"
    changes = {
        "run": "Watched-2026-11-24-0300",
        "stages": STAGES,
        "data": {"shards": f"{folder}/train-{{0..2}}.tar", "damaged": "skip"},
        "segment_steps": 20,
    }
    plan.write_text(yaml.safe_dump(values(folder, **changes)))
    clean = {
        k: v for k, v in os.environ.items() if not k.startswith("PREFECT_") or k == "PREFECT_HOME"
    }
    return subprocess.Popen(
        [sys.executable, "-m", "secateur.flows.cli", "run", str(plan)],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=clean | {"PREFECT_API_URL": str(server.base_url).rstrip("/")},
    )


def query_server(server: httpx.Client, what: str, **body: Any) -> list[dict[str, Any]]:
    """Return the server's objects of a kind, filtered."""
    answer = server.post(f"/{what}/filter", json=body)
    assert answer.is_success, answer.text
    return list(answer.json())


def test_a_run_is_terminated_resumed_and_shown(server: httpx.Client, folder: Path) -> None:
    stage = RunFolder(f"{folder}/runs/Watched-2026-11-24-0300").stage(0)
    process = start(server, folder)
    wait_for(lambda: process.poll() is not None or stage.segment(2).committed)
    # A worker ends a cancelled flow run by this signal.
    process.send_signal(signal.SIGTERM)
    terminated = time.monotonic()
    _, errors = process.communicate(timeout=120)
    assert time.monotonic() - terminated < 60
    assert process.returncode == 128 + signal.SIGTERM
    assert "interrupted; the same command continues after the last whole segment" in errors
    assert "Traceback" not in errors
    wait_for(lambda: query_server(server, "flow_runs")[0]["state"]["type"] == "CRASHED", 60)
    done = [segment.fingerprint for segment in stage.segments()]
    assert 3 <= len(done) < 20
    (progress,) = query_server(
        server, "artifacts", artifacts={"key": {"any_": ["secateur-watched-stage-0-training"]}}
    )
    assert (progress["type"], float(progress["data"]) < 100) == ("progress", True)

    process = start(server, folder)
    _, errors = process.communicate(timeout=1200)
    assert process.returncode == 0, errors
    assert "Traceback" not in errors
    assert [segment.fingerprint for segment in stage.segments()][: len(done)] == done
    check_shown(server, folder)

    process = start(server, folder)
    _, errors = process.communicate(timeout=1200)
    assert process.returncode == 0, errors
    runs = query_server(server, "flow_runs", sort="START_TIME_DESC")
    wait_for(lambda: "train" in cached(server, runs[0]["id"]), 30)
    wait_for(lambda: cached(server, runs[0]["id"]) == CACHED, 60)


def cached(server: httpx.Client, flow_run: str) -> set[str]:
    """Return the names of a flow run's tasks that took their result from the cache."""
    runs = query_server(server, "task_runs", flow_runs={"id": {"any_": [flow_run]}})
    return {run["name"].split(",")[0] for run in runs if run["state"]["name"] == "Cached"}


def check_shown(server: httpx.Client, folder: Path) -> None:
    """Check that every artifact exists, under a key without the date, and that data is escaped."""
    latest = {one["key"]: one for one in query_server(server, "artifacts/latest")}
    kinds = {key.removeprefix("secateur-watched-"): one["type"] for key, one in latest.items()}
    assert kinds == {
        f"stage-{stage}{suffix}": kind for stage in (0, 1) for suffix, kind in KINDS.items()
    }
    assert float(latest["secateur-watched-stage-0-training"]["data"]) == 100
    assert latest["secateur-watched-stage-0-profile"]["data"].startswith("data:image/png;base64,")
    rows = latest["secateur-watched-stage-0"]["data"]
    assert "dropped: top: score not among the best 0.5" in rows
    samples = latest["secateur-watched-stage-0-samples"]["data"]
    assert "digit-" in samples
    assert "<script" not in samples
    link = latest["secateur-watched-stage-0-report"]["data"]
    path = link[link.index("file://") + 7 : link.index("report.html") + 11]
    assert Path(path).read_text().startswith("<!doctype html>")
    logs = [one["message"] for one in query_server(server, "logs", sort="TIMESTAMP_ASC", limit=200)]
    assert any(
        message.startswith("left out: shard") and "train-2.tar" in message for message in logs
    )

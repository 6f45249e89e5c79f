"""The Prefect server that a command starts: its errors, its end, and its answers when busy."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import psutil
import pytest
from starlette.responses import PlainTextResponse

from secateur.tasks.engine.prefect_internals import with_retry_after
from tests.flows.test_cli import secateur, sentence, write_plan
from tests.servers import free_ports
from tests.tasks.small import make_data


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("server")
    make_data(folder)
    return folder


def test_a_configured_server_that_does_not_answer_is_one_sentence(folder: Path) -> None:
    url = f"http://127.0.0.1:{free_ports(1)[0]}/api"
    done = secateur("run", write_plan(folder, run="no-server"), PREFECT_API_URL=url)
    assert (
        sentence(done)
        == f"secateur: no Prefect server answers at {url}; start it, or unset PREFECT_API_URL"
    )


def test_a_server_that_does_not_start_is_one_sentence(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "prefect.db").write_bytes(
        b"no database, but a file of this name that is long enough to be looked at" * 20
    )
    done = secateur("run", write_plan(folder, run="damaged"), PREFECT_HOME=str(tmp_path))
    message = sentence(done)
    assert "Prefect's server does not start" in message
    assert f"{tmp_path} can be written and holds no damaged prefect.db" in message


@pytest.mark.parametrize(("status", "seconds"), [(503, "0.25"), (200, None)])
def test_a_busy_server_says_how_soon_to_retry(status: int, seconds: str | None) -> None:
    """Otherwise Prefect's clients wait two seconds, and a run took twice as long."""

    async def get_answer() -> httpx.Response:
        transport = httpx.ASGITransport(with_retry_after(PlainTextResponse("", status)))
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
            return await client.get("/")

    assert asyncio.run(get_answer()).headers.get("retry-after") == seconds


FAILS = """
from secateur.tasks.engine.prefect_server import prefect_server
with prefect_server():
    from prefect.events import emit_event
    emit_event("secateur.test", resource={"prefect.resource.id": "secateur.test"})
    raise SystemExit("the reason")
"""


def test_a_command_that_fails_sends_its_events_before_its_server_ends() -> None:
    """Prefect would send them at the interpreter's exit, fail, and print that below the message."""
    done = subprocess.run([sys.executable, "-c", FAILS], capture_output=True, text=True)
    assert "the reason" in done.stderr
    assert "Unable to connect" not in done.stderr
    assert "failed with" not in done.stderr


def test_a_killed_command_leaves_no_server(folder: Path) -> None:
    plan = write_plan(folder, run="killed", stages=[{"steps": 100_000, "batch_size": 20}])
    process = subprocess.Popen(
        [sys.executable, "-m", "secateur.flows.cli", "run", plan], stderr=subprocess.PIPE, text=True
    )
    while not (folder / "runs/killed/stages/00/ledger/seg-00000/manifest.json").exists():
        assert process.poll() is None
        time.sleep(0.1)
    (server,) = [
        c
        for c in psutil.Process(process.pid).children()
        if "secateur.tasks.engine.prefect_server" in c.cmdline()
    ]
    process.send_signal(signal.SIGKILL)
    process.communicate()
    server.wait(60)
    assert not server.is_running()

"""Fixtures, and settings that must be made before Prefect and torch are imported.

Tests use one thread. Prefect stays offline and keeps its state out of the user's home.
"""

from __future__ import annotations

import os
import tempfile

os.environ.update(
    SECATEUR_CACHE=tempfile.mkdtemp(prefix="secateur-"),
    PREFECT_HOME=tempfile.mkdtemp(prefix="prefect-"),
    PREFECT_SERVER_ANALYTICS_ENABLED="false",
    DO_NOT_TRACK="1",
    PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS="180",
    PREFECT_LOGGING_LEVEL="CRITICAL",
    PREFECT_SERVER_LOGGING_LEVEL="CRITICAL",
    OMP_NUM_THREADS="1",
)

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.servers import Rclone, SeaweedFS, Server

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def server() -> Iterator[str]:
    """An S3 server (moto) on a free port."""
    from moto.server import ThreadedMotoServer

    running = ThreadedMotoServer(port=0, verbose=False)
    running.start()
    host, port = running.get_host_and_port()
    yield f"http://{host}:{port}"
    running.stop()


@pytest.fixture
def bucket(server: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The URL of a bucket on it. The credentials are in the environment."""
    import s3fs

    settings = {
        "ACCESS_KEY_ID": "test",
        "SECRET_ACCESS_KEY": "test",
        "ENDPOINT_URL": server,
        "DEFAULT_REGION": "us-east-1",
    }
    _set_environment({f"AWS_{name}": value for name, value in settings.items()}, monkeypatch)
    s3fs.S3FileSystem().mkdirs("bucket", exist_ok=True)
    return "s3://bucket"


@pytest.fixture(scope="session")
def seaweed_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A SeaweedFS server, an S3 store that keeps its files on disk."""
    yield from _run_server(SeaweedFS(tmp_path_factory.mktemp("seaweed")))


@pytest.fixture(scope="session")
def rclone_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """An rclone server, an S3 store that ignores the condition of a put."""
    yield from _run_server(Rclone(tmp_path_factory.mktemp("rclone")))


@pytest.fixture
def seaweedfs(seaweed_server: Server, monkeypatch: pytest.MonkeyPatch) -> str:
    """The URL of a bucket on SeaweedFS."""
    _set_environment(seaweed_server.environment, monkeypatch)
    return "s3://bucket"


@pytest.fixture
def rclone(rclone_server: Server, monkeypatch: pytest.MonkeyPatch) -> str:
    """The URL of a bucket on rclone."""
    # With a part of a file, rclone sends the checksum of the whole file.
    checks = {"AWS_RESPONSE_CHECKSUM_VALIDATION": "when_required"}
    _set_environment(rclone_server.environment | checks, monkeypatch)
    return "s3://bucket"


@pytest.fixture(params=["local", "moto", "seaweedfs"])
def base(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty folder: on the local disk, and on two S3 servers."""
    if request.param == "local":
        return str(tmp_path / "base")
    bucket = request.getfixturevalue("bucket" if request.param == "moto" else "seaweedfs")
    return f"{bucket}/{tmp_path.name}"


def _run_server(server: Server) -> Iterator[Server]:
    try:
        server.start()
        yield server
    finally:
        server.kill()


def _set_environment(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    import s3fs

    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()

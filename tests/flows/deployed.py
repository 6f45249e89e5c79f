"""A Prefect server, its worker and the three deployments, made by the commands of docs/deploy.md in a folder of their own."""

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
PATIENCE = 900.0  # of a machine that does much else; all of it takes a minute
ENDED = ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")


class Shell:
    """Runs the page in one shell, a part (what stands under a heading) at a time."""

    def __init__(self, folder: Path, changes: dict[str, str], environment: dict[str, str]) -> None:
        self.folder, self.home = folder, environment["PREFECT_HOME"]
        page = Path("docs/deploy.md").read_text()
        for old, new in changes.items():
            assert old in page, f"docs/deploy.md no longer says {old}"
            page = page.replace(old, new)
        # Job control (-m), as in a terminal: else what is begun with & is deaf to SIGINT, by which workers end.
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
        """Runs one part to its end; the empty title is what stands before the first heading."""
        number = ["", *self.titles].index(title)
        (self.folder / f"go-{number}").touch()
        wait_for(
            lambda: self._done(number),
            seconds,
            lambda: (self.folder / "page.log").read_text()[-3000:],
        )

    def close(self) -> None:
        """Ends the shell and all that it left in the background: server, worker, flow runs."""
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
    """A server with its deployments, seen through its API."""

    folder: Path
    client: httpx.Client
    environment: dict[str, str]
    shell: Shell | None = None

    def get(self, path: str) -> Any:
        return self._answer("GET", path, None)

    def post(self, path: str, /, **body: Any) -> Any:
        return self._answer("POST", path, body)

    def deployment(self, name: str) -> dict[str, Any]:
        """A deployment, by `flow/deployment`."""
        found: dict[str, Any] = self.get(f"/deployments/name/{name}")
        return found

    def copied(self, name: str, /, **changes: Any) -> dict[str, Any]:
        """A copy of a deployment under another name, or on another pool, or with other schedules."""
        found = self.deployment(name)
        kept = ("flow_id", "entrypoint", "path", "pull_steps", "parameters", "parameter_openapi_schema", "job_variables",
                "concurrency_options", "work_pool_name")  # fmt: skip
        limit = (found["global_concurrency_limit"] or {}).get("limit")
        body = {key: found[key] for key in kept} | {"concurrency_limit": limit} | changes
        made: dict[str, Any] = self.post("/deployments/", **body)
        return made

    def start(self, deployment: dict[str, Any], **parameters: Any) -> str:
        """Starts a flow run of a deployment; its id."""
        made = self.post(f"/deployments/{deployment['id']}/create_flow_run", parameters=parameters)
        return str(made["id"])

    def flow_run(self, identity: str) -> dict[str, Any]:
        found: dict[str, Any] = self.get(f"/flow_runs/{identity}")
        return found

    def flow_runs(self, deployment: dict[str, Any]) -> list[dict[str, Any]]:
        """A deployment's flow runs, in the order in which they began."""
        found = self.post(
            "/flow_runs/filter",
            deployments={"id": {"any_": [deployment["id"]]}},
            sort="START_TIME_ASC",
        )
        return list(found)

    def state(self, identity: str, *wanted: str, seconds: float = PATIENCE) -> dict[str, Any]:
        """Waits until a flow run is in one of some states, or has ended; that state."""
        wanted = wanted or ENDED

        def arrived() -> bool:
            state = self.flow_run(identity)["state"]
            assert state["type"] in (*wanted, "SCHEDULED", "PENDING", "RUNNING"), state
            return state["type"] in wanted

        wait_for(
            arrived, seconds, lambda: f"{self.flow_run(identity)['state']} {self.logs(identity)}"
        )
        found: dict[str, Any] = self.flow_run(identity)["state"]
        return found

    def logs(self, identity: str) -> str:
        found = self.post(
            "/logs/filter", logs={"flow_run_id": {"any_": [identity]}}, sort="TIMESTAMP_ASC"
        )
        return "\n".join(one["message"] for one in found)

    def emit(self, stage: int, run: Path, name: str = "secateur.stage.trained") -> None:
        """What a trainer of one's own says, with an id of its own each time."""
        event = {
            "occurred": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "event": name,
            "resource": {"prefect.resource.id": f"secateur.run.{run.name}"},
            "payload": {"run": str(run), "stage": stage},
            "id": str(uuid.uuid4()),
        }
        self._answer("POST", "/events", [event])

    def events(self, *names: str, resource: str | None = None) -> list[dict[str, Any]]:
        """Events the server has kept, in the order in which they occurred."""
        narrowed: dict[str, Any] = (
            {"event": {"name": list(names)}} if names else {"event": {"prefix": ["secateur."]}}
        )
        if resource:
            narrowed["resource"] = {"id": [resource]}
        found = self.post("/events/filter", filter=narrowed | {"order": "ASC"}, limit=50)["events"]
        return list(found)

    def _answer(self, method: str, path: str, body: Any) -> Any:
        """What the server answers; like Prefect's own client it asks again while the database is too busy."""
        answers: list[httpx.Response] = []

        def answered() -> bool:
            answers.append(self.client.request(method, path, json=body))
            return answers[-1].status_code != httpx.codes.SERVICE_UNAVAILABLE

        wait_for(answered, PATIENCE, lambda: answers[-1].text)
        assert answers[-1].is_success, answers[-1].text
        return answers[-1].json() if answers[-1].content else None


def wait_for(holds: Callable[[], bool], seconds: float, told: Callable[[], str]) -> None:
    """Waits until something holds; fails with what is told otherwise."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, told()
        time.sleep(0.3)


def make_project(folder: Path) -> None:
    """The repository's folder, with the image example's plan made short."""
    for room in ROOMS:
        (folder / room).symlink_to(Path(room).resolve())
    for copied in ("examples", "automations"):
        shutil.copytree(copied, folder / copied, ignore=shutil.ignore_patterns("__pycache__"))
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
    """What the page's shell finds: no Prefect setting of the tests, a home of its own, and a free port."""
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
    """Begins the page; its first part has still to be run."""
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
        "AWS_ACCESS_KEY_ID=key AWS_SECRET_ACCESS_KEY=secret": f"AWS_ACCESS_KEY_ID={KEY} AWS_SECRET_ACCESS_KEY={SECRET}",
    }
    settings = environment(folder, port)
    settings["PATH"] = f"{database.programs}:{settings['PATH']}"
    shell = Shell(folder, changes, settings)
    return Deployed(
        folder, httpx.Client(base_url=f"http://127.0.0.1:{port}/api", timeout=300), settings, shell
    )

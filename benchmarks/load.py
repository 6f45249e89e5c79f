"""Submits queries and prunes to one Prefect server, all at once, and says how each ended and how long it took.

    python -m benchmarks.load [--queries 40] [--prunes 5] [--limit 4]

The image example, shortened, is run first. Then every query and prune is a flow run of the deployments in prefect.yaml, on one
worker that runs `--limit` of them at a time; the prunes, each by another policy, are about the same run and wait for one
another. A flow run's time is from when its process began until it ended; its wait is from the submission until then.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from statistics import median
from typing import Any

import httpx

from secateur.tasks.pruning.prune import pruning_name
from secateur.tasks.run.run import Run
from tests.flows.deployed import ENDED, Deployed, environment, make_project, wait_for
from tests.servers import free_ports

POLICIES: list[dict[str, Any]] = [
    {"policy": "top", "keep": 0.6},
    {"policy": "balanced", "keep": 0.6, "by": "cls"},
    {"policy": "random", "keep": 0.6},
    {"policy": "loss", "keep": 0.6},
    {"policy": "drop_harmful"},
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--queries", type=int, default=40)
    parser.add_argument(
        "--prunes", type=int, default=len(POLICIES), choices=range(len(POLICIES) + 1)
    )
    parser.add_argument("--limit", type=int, default=4, help="flow runs at a time")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="load-"))
    try:
        with deployed(folder, options.limit) as (project, begin):
            begin.command("examples.images.make_shards")
            begin.command("secateur.flows.cli", "run", "examples/images/plan.yaml")
            submitted = submit(project, folder, options.queries, options.prunes)
            begun = time.monotonic()
            wait_for(
                lambda: all(ended(project, submitted)), 3600, lambda: str(ended(project, submitted))
            )
            seconds = time.monotonic() - begun
            found = {
                kind: [project.flow_run(one) for one in ones] for kind, ones in submitted.items()
            }
            for kind, runs in found.items():
                report(kind, runs)
            print(
                f"all {sum(map(len, found.values()))} in {seconds:.0f} s, {options.limit} at a time"
            )
            run = Run.open(f"{folder}/runs/images")
            made = [
                run.folder.stage(0).prune(pruning_name(run, 0, policy)).committed
                for policy in POLICIES[: options.prunes]
            ]
            print(f"prunes committed: {sum(made)} of {len(made)}")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def submit(project: Deployed, folder: Path, queries: int, prunes: int) -> dict[str, list[str]]:
    """Every flow run, one after the other, as fast as the server takes them; their ids."""
    query, prune = (
        project.deployment(name) for name in ("query/on-demand", "prune/on-stage-trained")
    )
    run = f"{folder}/runs/images"
    asked = [
        {"run": run, "target": ("clean", "test")[n % 2], "harmful": n % 4 > 1, "top": 5 + n}
        for n in range(queries)
    ]
    pruned = [{"run": run, "stage": 0, "policy": policy} for policy in POLICIES[:prunes]]
    return {
        "prune": [project.start(prune, **parameters) for parameters in pruned],
        "query": [project.start(query, **parameters) for parameters in asked],
    }


def ended(project: Deployed, submitted: dict[str, list[str]]) -> list[bool]:
    """Which flow runs have ended."""
    wanted = [one for ones in submitted.values() for one in ones]
    found = project.post("/flow_runs/filter", flow_runs={"id": {"any_": wanted}}, limit=200)
    return [run["state"]["type"] in ENDED for run in found]


def report(kind: str, runs: list[dict[str, Any]]) -> None:
    """States, and least, median and greatest times of one kind of flow run."""
    if not runs:
        return
    states = Counter(run["state"]["name"] for run in runs)
    print(f"{kind}: {', '.join(f'{count} {state}' for state, count in states.items())}")
    measures: dict[str, Callable[[dict[str, Any]], float]] = {
        "time": lambda run: seconds_between(run["start_time"], run["end_time"]),
        "wait": lambda run: seconds_between(run["created"], run["start_time"]),
        "both": lambda run: seconds_between(run["created"], run["end_time"]),
    }
    for name, measure in measures.items():
        taken = [measure(run) for run in runs]
        print(f"  {name}: median {median(taken):.1f} s ({min(taken):.1f} to {max(taken):.1f})")


def seconds_between(start: str, end: str) -> float:
    return (datetime.fromisoformat(end) - datetime.fromisoformat(start)).total_seconds()


class Begin:
    """Begins the commands of a deployment in its folder, and ends them."""

    def __init__(self, folder: Path, settings: dict[str, str], limit: int) -> None:
        self.folder, self.settings = folder, settings
        self.running: dict[str, subprocess.Popen[bytes]] = {}
        self._words = {
            "server": ("prefect", "server", "start"),
            "worker": ("prefect", "worker", "start", "--pool", "secateur", "--limit", str(limit)),
        }

    def command(self, *words: str) -> None:
        """Runs one to its end."""
        python = [sys.executable, "-m"]
        subprocess.run(
            [*python, *words],
            cwd=self.folder,
            env=self.settings,
            check=True,
            stdout=subprocess.DEVNULL,
        )

    def __call__(self, name: str) -> None:
        """Begins the server or the worker."""
        with open(self.folder / "prefect.log", "ab") as log:
            self.running[name] = subprocess.Popen(
                [sys.executable, "-m", *self._words[name]],
                cwd=self.folder,
                env=self.settings,
                stdout=log,
                stderr=log,
            )

    def end(self) -> None:
        for process in reversed(self.running.values()):
            process.kill()  # a worker that is asked to end first waits for what it runs
            process.wait()


@contextmanager
def deployed(folder: Path, limit: int) -> Iterator[tuple[Deployed, Begin]]:
    """A server, the three deployments and a worker."""
    make_project(folder)
    (port,) = free_ports(1)
    settings = environment(folder, port) | {
        "DO_NOT_TRACK": "1",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    }
    settings["PWD"] = str(folder)  # `prefect deploy` has flow runs begin there
    settings["PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE"] = (
        "prefect.server.concurrency.lease_storage.filesystem"
    )
    settings["PREFECT_API_URL"] = f"http://127.0.0.1:{port}/api"
    begin = Begin(folder, settings, limit)
    client = httpx.Client(base_url=settings["PREFECT_API_URL"], timeout=300)
    try:
        begin("server")
        wait_for(lambda: healthy(client), 120, lambda: (folder / "prefect.log").read_text()[-2000:])
        begin.command("prefect", "work-pool", "create", "secateur", "--type", "process")
        begin.command("prefect", "--no-prompt", "deploy", "--all")
        begin("worker")
        yield Deployed(folder, client, settings), begin
    finally:
        client.close()
        begin.end()


def healthy(client: httpx.Client) -> bool:
    try:
        return client.get("/health").is_success
    except httpx.TransportError:
        return False


if __name__ == "__main__":
    main()

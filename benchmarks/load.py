"""Submit queries and prunes to one Prefect server, all together, and time them.

    python -m benchmarks.load [--queries 40] [--prunes 5] [--limit 4]

First a short version of the image example runs. Then every query and prune is a flow run of the
deployments in prefect.yaml, on one worker that runs `--limit` of them at a time. All prunes are of
the same run, each by another policy, and wait for one another. The time of a flow run is from the
start of its process to its end. Its wait is from the submission to that start.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from statistics import median
from typing import Any

import httpx

from secateur.tasks.plan import POLICIES as POLICY_TYPES
from secateur.tasks.pruning.prune import pruning_name
from secateur.tasks.run import Run
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
    """Start the server, submit everything, and print states and times."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--queries", type=int, default=40)
    parser.add_argument(
        "--prunes", type=int, default=len(POLICIES), choices=range(len(POLICIES) + 1)
    )
    parser.add_argument("--limit", type=int, default=4, help="flow runs at a time")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="load-"))
    try:
        with serve(folder, options.limit) as (project, processes):
            processes.run_module("examples.images.make_shards")
            processes.run_module("secateur.flows.cli", "run", "examples/images/plan.yaml")
            measure(project, folder, options.queries, options.prunes, options.limit)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def measure(project: Deployed, folder: Path, queries: int, prunes: int, limit: int) -> None:
    """Submit all flow runs, wait for their ends, and print states and times."""
    submitted = submit(project, folder, queries, prunes)
    start = time.monotonic()
    wait_for(
        lambda: all(have_ended(project, submitted)),
        3600,
        lambda: str(have_ended(project, submitted)),
    )
    seconds = time.monotonic() - start
    for kind, ids in submitted.items():
        print_times(kind, [project.flow_run(identity) for identity in ids])
    count = sum(len(ids) for ids in submitted.values())
    print(f"all {count} in {seconds:.0f} s, {limit} at a time")
    run = Run.open(f"{folder}/runs/images")
    names = [pruning_name(run, 0, POLICY_TYPES.parse(policy)) for policy in POLICIES[:prunes]]
    committed = [run.folder.stage(0).prune(name).committed for name in names]
    print(f"prunes committed: {sum(committed)} of {len(committed)}")


def submit(project: Deployed, folder: Path, queries: int, prunes: int) -> dict[str, list[str]]:
    """Submit every flow run, as fast as the server accepts them, and return their ids."""
    query = project.deployment("query/on-demand")
    prune = project.deployment("prune/on-stage-trained")
    run = f"{folder}/runs/images"
    questions = [
        {"run": run, "target": ("clean", "test")[n % 2], "harmful": n % 4 > 1, "top": 5 + n}
        for n in range(queries)
    ]
    prunings = [{"run": run, "stage": 0, "policy": policy} for policy in POLICIES[:prunes]]
    return {
        "prune": [project.start(prune, **parameters) for parameters in prunings],
        "query": [project.start(query, **parameters) for parameters in questions],
    }


def have_ended(project: Deployed, submitted: dict[str, list[str]]) -> list[bool]:
    """Return which flow runs have ended."""
    ids = [identity for kind_ids in submitted.values() for identity in kind_ids]
    flow_runs = project.post("/flow_runs/filter", flow_runs={"id": {"any_": ids}}, limit=200)
    return [flow_run["state"]["type"] in ENDED for flow_run in flow_runs]


def print_times(kind: str, flow_runs: list[dict[str, Any]]) -> None:
    """Print states, and the median, least and greatest times of one kind of flow run."""
    if not flow_runs:
        return
    states = Counter(flow_run["state"]["name"] for flow_run in flow_runs)
    print(f"{kind}: {', '.join(f'{count} {state}' for state, count in states.items())}")
    measures = {
        "time": ("start_time", "end_time"),
        "wait": ("created", "start_time"),
        "both": ("created", "end_time"),
    }
    for name, (start, end) in measures.items():
        seconds = [seconds_between(flow_run[start], flow_run[end]) for flow_run in flow_runs]
        spread = f"{median(seconds):.1f} s ({min(seconds):.1f} to {max(seconds):.1f})"
        print(f"  {name}: median {spread}")


def seconds_between(start: str, end: str) -> float:
    """Return the seconds between two ISO dates."""
    return (datetime.fromisoformat(end) - datetime.fromisoformat(start)).total_seconds()


class Processes:
    """The server and the worker of a deployment, which run in its folder."""

    def __init__(self, folder: Path, settings: dict[str, str], limit: int) -> None:
        self.folder = folder
        self.settings = settings
        self.running: dict[str, subprocess.Popen[bytes]] = {}
        self._commands = {
            "server": ("prefect", "server", "start"),
            "worker": ("prefect", "worker", "start", "--pool", "secateur", "--limit", str(limit)),
        }

    def run_module(self, *words: str) -> None:
        """Run a module with arguments to its end."""
        subprocess.run(
            [sys.executable, "-m", *words],
            cwd=self.folder,
            env=self.settings,
            check=True,
            stdout=subprocess.DEVNULL,
        )

    def start(self, name: str) -> None:
        """Start the server or the worker."""
        with open(self.folder / "prefect.log", "ab") as log:
            self.running[name] = subprocess.Popen(
                [sys.executable, "-m", *self._commands[name]],
                cwd=self.folder,
                env=self.settings,
                stdout=log,
                stderr=log,
            )

    def kill(self) -> None:
        """Kill both, because a worker that is only asked to end waits for its flow runs."""
        for process in reversed(self.running.values()):
            process.kill()
            process.wait()


@contextmanager
def serve(folder: Path, limit: int) -> Iterator[tuple[Deployed, Processes]]:
    """Run a server, the three deployments and a worker."""
    make_project(folder)
    (port,) = free_ports(1)
    settings = environment(folder, port) | {
        "DO_NOT_TRACK": "1",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": (
            "prefect.server.concurrency.lease_storage.filesystem"
        ),
        "PREFECT_API_URL": f"http://127.0.0.1:{port}/api",
        # Flow runs of a deployment start in the folder where `prefect deploy` was called.
        "PWD": str(folder),
    }
    processes = Processes(folder, settings, limit)
    client = httpx.Client(base_url=settings["PREFECT_API_URL"], timeout=300)
    log = folder / "prefect.log"
    try:
        processes.start("server")
        wait_for(lambda: is_healthy(client), 120, lambda: log.read_text()[-2000:])
        processes.run_module("prefect", "work-pool", "create", "secateur", "--type", "process")
        processes.run_module("prefect", "--no-prompt", "deploy", "--all")
        processes.start("worker")
        yield Deployed(folder, client, settings), processes
    finally:
        client.close()
        processes.kill()


def is_healthy(client: httpx.Client) -> bool:
    """Return whether the server answers."""
    try:
        return client.get("/health").is_success
    except httpx.TransportError:
        return False


if __name__ == "__main__":
    main()

"""Kill parts of a deployment while a flow run trains; print what Prefect shows.

    python -m benchmarks.outages [--parts process worker both server]

There is a server with the deployments and the automation of prefect.yaml, and one worker. For each
part, a flow run of `curate/nightly` starts a new run, and the part is killed with -9 after two
segments. The server is started again 5 s later, a worker once the flow run has ended.

The states that the UI shows are printed, with seconds since the kill. A flow run that does not
complete is retried, as by the UI's button, until it does. Its files are compared, by sha256, with
those of an undisturbed run.
"""

from __future__ import annotations

import argparse
import shutil
import signal
import tempfile
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil

from benchmarks.kills import SCORES, hash_outputs
from benchmarks.load import Processes, is_healthy, serve
from secateur.storage.folder import Folder
from secateur.storage.layout import RunFolder
from tests.flows.deployed import Deployed, wait_for
from tests.tasks.small import curate_small, make_data, small_plan, values

PARTS = ("process", "worker", "both", "server")
PATIENCE = 600.0
# Seconds before a retry. A user also takes some, and a worker still holds the place of a flow run
# when it reports that it crashed.
SECONDS_BEFORE_RETRY = 10.0
RETRY = {"type": "SCHEDULED", "name": "AwaitingRetry", "message": "Retry from the UI"}
STAGES: list[dict[str, Any]] = [
    {"steps": 4000, "batch_size": 20, "prune": {"policy": "top", "keep": 0.5}},
    {"steps": 100, "batch_size": 20},
]
CHANGES: dict[str, Any] = {"stages": STAGES, "segment_steps": 500}


def main() -> None:
    """Run the outage of each part, and print what happened."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="outages-"))
    try:
        make_data(folder)
        undisturbed = small_plan(folder, run="quiet", root=f"{folder}/quiet", **CHANGES)
        expected = hash_comparable(curate_small(undisturbed).url)
        with serve(folder, limit=2) as (project, processes):
            automation = "automations/zombies.yaml"
            processes.run_module("prefect", "automation", "create", "--from-file", automation)
            for part in options.parts:
                Outage(project, processes, folder, part).report(expected)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


class Outage:
    """A flow run that trains, and the part of the deployment that is killed."""

    def __init__(self, project: Deployed, processes: Processes, folder: Path, part: str) -> None:
        self.project = project
        self.processes = processes
        self.part = part
        self.run = folder / part / "quiet"
        plan = values(folder, run="quiet", root=f"{folder}/{part}", **CHANGES)
        deployment = project.deployment("curate/nightly")
        self.identity = project.start(deployment, plan=plan, dated=False)
        second = self.run / "stages/00/ledger/seg-00001/manifest.json"
        wait_for(second.exists, PATIENCE, lambda: project.logs(self.identity))
        self.killed = time.time()

    def report(self, expected: dict[str, str]) -> None:
        """Kill the part, wait for the flow run's end, and print its states and its files."""
        self.kill()
        before = self.segment_attempts()
        retries = 0
        while (state := self.wait_for_end())["type"] != "COMPLETED":
            time.sleep(SECONDS_BEFORE_RETRY)
            self.project.post(f"/flow_runs/{self.identity}/set_state", state=RETRY)
            retries += 1
            assert retries < 4, state
        after = self.segment_attempts()
        kept = sum(attempt in before for attempt in after)
        print(f"killed: {self.part}")
        for one in self.project.get(f"/flow_run_states/?flow_run_id={self.identity}"):
            seconds = datetime.fromisoformat(one["timestamp"]).timestamp() - self.killed
            message = " ".join((one["message"] or "").split())[:110]
            print(f"  {seconds:+7.1f} s  {one['name']:14} {message}")
        hashes = hash_comparable(str(self.run))
        differing = [name for name in expected if hashes.get(name) != expected[name]]
        counts = f"segments {len(after)}, of {len(before)} there before {kept} kept"
        print(f"  retries {retries}; {counts}")
        print(
            f"  files that differ: {len(differing)} of {len(expected)} {' '.join(differing)}",
            flush=True,
        )

    def segment_attempts(self) -> list[str]:
        """Return the attempts that committed the first stage's segments."""
        segments = RunFolder(str(self.run)).stage(0).segments()
        return [segment.manifest.attempt for segment in segments]

    def kill(self) -> None:
        """Kill the part."""
        worker = self.processes.running["worker"]
        server = self.processes.running["server"]
        flows = psutil.Process(worker.pid).children(recursive=True)
        if self.part == "server":
            server.send_signal(signal.SIGKILL)
            time.sleep(5)
            self.processes.start("server")
            wait_for(
                lambda: is_healthy(self.project.client),
                PATIENCE,
                lambda: "the server does not start again",
            )
            return
        victims = {"process": flows, "worker": [worker], "both": [worker, *flows]}[self.part]
        for victim in victims:
            victim.send_signal(signal.SIGKILL)

    def wait_for_end(self) -> dict[str, Any]:
        """Wait until the flow run has ended, restart a killed worker, and return the state."""
        state = self.project.wait_for_state(self.identity, seconds=PATIENCE)
        if self.processes.running["worker"].poll() is not None:
            self.processes.start("worker")
        return state


def hash_comparable(run: str) -> dict[str, str]:
    """Return the sha256 of the run's committed files, without those that name its folder."""
    hashes = hash_outputs(Folder(run))
    return {
        name: sha256 for name, sha256 in hashes.items() if not name.endswith((SCORES, "plan.yaml"))
    }


if __name__ == "__main__":
    main()

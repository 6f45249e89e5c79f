"""Kills parts of a deployment while a flow run trains, and says what Prefect shows and how the run carries on.

    python -m benchmarks.outages [--parts process worker both server]

For each part a run of its own of `curate/nightly`, on a server with the deployments and the automation of prefect.yaml and one
worker: it is killed with -9 after two segments (the server is started again 5 s later, a worker once the flow run has ended).
The states that the UI shows are printed, with seconds since the kill. A flow run that does not end well is retried, as by the
UI's button, until it does; what it comes to is compared, by sha256, with a run that nobody disturbed.
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
from benchmarks.load import Begin, deployed, healthy
from secateur.storage.folder import Folder
from secateur.storage.layout import RunFolder
from tests.flows.deployed import Deployed, wait_for
from tests.tasks.small import curate_small, make_data, small_plan, values

PARTS = ("process", "worker", "both", "server")
PATIENCE = 600.0
READING = 10.0  # before retrying, as a user does; a worker still holds a flow run's place as it says that it crashed
AGAIN = {"type": "SCHEDULED", "name": "AwaitingRetry", "message": "Retry from the UI"}
STAGES: list[dict[str, Any]] = [
    {"steps": 4000, "batch_size": 20, "prune": {"policy": "top", "keep": 0.5}},
    {"steps": 100, "batch_size": 20},
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="outages-"))
    try:
        make_data(folder)
        quiet = curate_small(small_plan(folder, run="quiet", root=f"{folder}/quiet", **changes()))
        expected = content(quiet.url)
        with deployed(folder, limit=2) as (project, begin):
            begin.command(
                "prefect", "automation", "create", "--from-file", "automations/zombies.yaml"
            )
            for part in options.parts:
                Outage(project, begin, folder, part).report(expected)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def changes() -> dict[str, Any]:
    return {"stages": STAGES, "segment_steps": 500}


class Outage:
    """One part, killed in the middle of a flow run."""

    def __init__(self, project: Deployed, begin: Begin, folder: Path, part: str) -> None:
        self.project, self.begin, self.part = project, begin, part
        self.run = folder / part / "quiet"
        plan = values(folder, run="quiet", root=f"{folder}/{part}", **changes())
        self.identity = project.start(project.deployment("curate/nightly"), plan=plan, dated=False)
        second = self.run / "stages/00/ledger/seg-00001/manifest.json"
        wait_for(second.exists, PATIENCE, lambda: project.logs(self.identity))
        self.killed = time.time()

    def report(self, expected: dict[str, str]) -> None:
        """Kills the part, sees the flow run to its end, and prints what was shown and what came out."""
        self.kill()
        kept = [
            segment.manifest.attempt for segment in RunFolder(str(self.run)).stage(0).segments()
        ]
        retries = 0
        while (state := self.ended())["type"] != "COMPLETED":
            time.sleep(READING)
            self.project.post(f"/flow_runs/{self.identity}/set_state", state=AGAIN)
            retries += 1
            assert retries < 4, state
        segments = RunFolder(str(self.run)).stage(0).segments()
        same = sum(segment.manifest.attempt in kept for segment in segments)
        print(f"killed: {self.part}")
        for one in self.project.get(f"/flow_run_states/?flow_run_id={self.identity}"):
            seconds = datetime.fromisoformat(one["timestamp"]).timestamp() - self.killed
            print(
                f"  {seconds:+7.1f} s  {one['name']:14} {' '.join((one['message'] or '').split())[:110]}"
            )
        found = content(str(self.run))
        differ = [name for name in expected if found.get(name) != expected[name]]
        print(
            f"  retries {retries}; segments {len(segments)}, of {len(kept)} there before {same} kept"
        )
        print(
            f"  files that differ: {len(differ)} of {len(expected)} {' '.join(differ)}", flush=True
        )

    def kill(self) -> None:
        worker, server = self.begin.running["worker"], self.begin.running["server"]
        flows = psutil.Process(worker.pid).children(recursive=True)
        if self.part == "server":
            server.send_signal(signal.SIGKILL)
            time.sleep(5)
            self.begin("server")
            wait_for(
                lambda: healthy(self.project.client),
                PATIENCE,
                lambda: "the server does not start again",
            )
            return
        victims = {"process": flows, "worker": [worker], "both": [worker, *flows]}[self.part]
        for victim in victims:
            victim.send_signal(signal.SIGKILL)

    def ended(self) -> dict[str, Any]:
        """How the flow run ended; a killed worker is back by then."""
        state = self.project.state(self.identity, seconds=PATIENCE)
        if self.begin.running["worker"].poll() is not None:
            self.begin("worker")
        return state


def content(run: str) -> dict[str, str]:
    """The sha256 of what the run committed, but for the files that name its folder."""
    found = hash_outputs(Folder(run))
    return {
        name: sha256 for name, sha256 in found.items() if not name.endswith((SCORES, "plan.yaml"))
    }


if __name__ == "__main__":
    main()

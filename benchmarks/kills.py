"""Kills of a run at random moments: each resumed run is compared with an uninterrupted one.

    python -m benchmarks.kills [--kills 60] [--servers 5] [--store disk seaweedfs]

A two-stage plan on the data of the image example runs through the command line. It is killed with
-9 at random moments, spread evenly over its outputs and so over its tasks. Then the same command
resumes it. Every file that the run committed is compared with the uninterrupted run's by SHA-256,
and the pruned shards key by key. SeaweedFS is also killed while a run uses it, and started again.

The processes are forked from one that has imported torch and Prefect, which saves most of an hour.
They share a Prefect server of the kind that each command would start for itself.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from itertools import pairwise
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import polars as pl
import yaml

from examples.images.make_shards import make
from secateur.flows.cli import QUIET
from secateur.storage.folder import Folder
from secateur.storage.frames import read_frame
from secateur.storage.integrity import find_stray_files, verify_folder
from secateur.storage.layout import PLAN_PRUNING, RunFolder
from secateur.storage.manifest import MANIFEST_FILE
from secateur.storage.outputs import list_outputs
from secateur.storage.shard_listing import list_shards
from secateur.tasks.engine.prefect_server import prefect_server
from tests.servers import SeaweedFS

FORKS = get_context("forkserver")
SEED = 20
POLL = 0.2  # seconds
SCORES = "scores.parquet"
COUNTS = ("failed", "lost", "duplicated", "differing shards", "differing files", "damaged")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--servers", type=int, default=5)
    parser.add_argument(
        "--store", nargs="+", choices=["disk", "seaweedfs"], default=["disk", "seaweedfs"]
    )
    options = parser.parse_args()
    # An interruption runs the `finally` blocks below, which end the servers.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    folder = Path(tempfile.mkdtemp(prefix="kills-"))
    FORKS.set_forkserver_preload(["secateur.flows.curate"])
    os.environ.update(
        QUIET,
        OMP_NUM_THREADS="1",
        PREFECT_HOME=str(folder / "prefect"),
        SECATEUR_CACHE=str(folder / "cache"),
    )
    print(f"seed {SEED}", flush=True)
    try:
        make(str(folder / "data"), 0)
        with prefect_server():
            if "disk" in options.store:
                Trial(folder, f"{folder}/runs").kills(options.kills)
            if "seaweedfs" in options.store:
                server = SeaweedFS(folder / "seaweed")
                server.start()
                os.environ.update(server.environment)
                try:
                    trial = Trial(folder, "s3://bucket/runs")
                    trial.kills(options.kills)
                    trial.server_kills(options.servers, server)
                finally:
                    server.kill()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


class Trial:
    """One store: an uninterrupted run, and the interrupted runs in the same folder."""

    def __init__(self, folder: Path, root: str) -> None:
        self.folder = folder
        self.run = Folder(f"{root}/killed")
        self.plan = folder / "plan.yaml"
        self.plan.write_text(yaml.safe_dump(_plan(root, folder / "data")))
        # The outputs that were committed so far, in order.
        self.outputs: list[str] = []
        moments: list[float] = []
        start = time.monotonic()
        process = self._start()
        while process.is_alive():
            moments += [time.monotonic() - start] * self._find_outputs()
            time.sleep(POLL)
        assert process.exitcode == 0, (folder / "run.log").read_text()[-2000:]
        seconds = time.monotonic() - start
        # The seconds before each commit, and after the last one.
        self.gaps = [b - a for a, b in pairwise([0.0, *moments, seconds])]
        self.expected = hash_outputs(self.run)
        self.keys = self._kept_keys()
        print(
            f"{self.run.url}: uninterrupted {seconds:.1f} s, {len(list_outputs(self.run))} outputs "
            f"of {len(self.expected)} files, {len(self.keys)} samples kept",
            flush=True,
        )
        self.run.delete()

    def kills(self, count: int) -> None:
        """Kill the run at `count` moments, and resume it each time."""
        total = Counter[str]()
        for moment in self._moments(count, SEED):
            start = time.monotonic()
            process = self._start()
            self._wait_for(process, moment)
            process.kill()
            process.join()
            seconds = time.monotonic() - start
            killed = process.exitcode == -signal.SIGKILL
            event = "killed" if killed else "ended before it was killed"
            total += self._resume(f"{event} after {seconds:5.2f} s, {self._state()}")
        print(f"{self.run.url}: {count} kills: {_format_counts(total)}", flush=True)

    def server_kills(self, count: int, server: SeaweedFS) -> None:
        """Kill the server during a run. The run may fail, but the same command must resume it."""
        total = Counter[str]()
        for moment in self._moments(count, SEED + 1):
            start = time.monotonic()
            process = self._start()
            self._wait_for(process, moment)
            server.kill()
            seconds = time.monotonic() - start
            server.start()
            state = self._state()
            process.join()
            total += self._resume(
                f"server killed after {seconds:5.2f} s, {state}; "
                f"the run ended with {process.exitcode}"
            )
        print(f"{self.run.url}: {count} server kills: {_format_counts(total)}", flush=True)

    def _moments(self, count: int, seed: int) -> list[tuple[int, float]]:
        """Draw moments: a number of committed outputs, and seconds after the last of them."""
        rng = random.Random(seed)
        positions = [len(self.gaps) * (n + rng.random()) / count for n in range(count)]
        rng.shuffle(positions)
        moments = []
        for position in positions:
            outputs = int(position)
            moments.append((outputs, (position - outputs) * self.gaps[outputs]))
        return moments

    def _wait_for(self, process: BaseProcess, moment: tuple[int, float]) -> None:
        """Wait for a moment, or the end of the run."""
        outputs, seconds = moment
        self.outputs = []
        while len(self.outputs) < outputs and process.is_alive():
            self._find_outputs()
            time.sleep(POLL)
        process.join(seconds)

    def _state(self) -> str:
        """Describe the committed outputs, and count the files of unfinished attempts."""
        self._find_outputs()
        last = self.outputs[-1] if self.outputs else "none"
        stray = len(find_stray_files(self.run))
        return f"{len(self.outputs):2d} outputs committed (the last {last}), {stray} stray files"

    def _find_outputs(self) -> int:
        """Add newly committed outputs to `outputs`, and return their number."""
        # Removed ones stay in the list: some outputs are removed once others replace them.
        manifests = [name for name in self.run.files() if name.endswith(f"/{MANIFEST_FILE}")]
        outputs = {name.removesuffix(f"/{MANIFEST_FILE}") for name in manifests}
        new = sorted(outputs - set(self.outputs))
        self.outputs += new
        return len(new)

    def _kept_keys(self) -> list[str]:
        """Return the keys in the pruned shards, read from the shards themselves."""
        pruning = RunFolder(self.run.url).stage(0).prune(PLAN_PRUNING)
        shards = [pruning.url(name) for name in pruning.names() if name.startswith("shards/")]
        return [key for shard in shards for key in list_shards([shard])["key"].to_list()]

    def _resume(self, event: str) -> Counter[str]:
        """Resume the run to its end, and count how it differs from the uninterrupted one."""
        process = self._start()
        process.join()
        failed = process.exitcode != 0
        files = {} if failed else hash_outputs(self.run)
        keys = [] if failed else self._kept_keys()
        names = files.keys() | self.expected.keys()
        differing = [name for name in names if files.get(name) != self.expected.get(name)]
        counts = Counter(
            {
                "failed": int(failed),
                "lost": len(set(self.keys) - set(keys)),
                "duplicated": len(keys) - len(set(keys)),
                "differing shards": sum("/shards/" in name for name in differing),
                "differing files": len(differing),
                "damaged": sum(f.what != "extra" for f in verify_folder(self.run)),
            }
        )
        details = "".join(f"; {name} differs" for name in differing)
        print(f"  {event}: {_format_counts(counts)}{details}", flush=True)
        if failed:
            print((self.folder / "run.log").read_text()[-2000:], flush=True)
        self.run.delete()
        return counts

    def _start(self) -> BaseProcess:
        """Start `secateur run` in a new process."""
        arguments = (str(self.plan), str(self.folder / "run.log"), dict(os.environ))
        process = FORKS.Process(target=_run_secateur, args=arguments)
        process.start()
        return process


def hash_outputs(run: Folder) -> dict[str, str]:
    """Return the SHA-256 of every committed file, by its name without the attempt."""
    hashes: dict[str, str] = {}
    for output in list_outputs(run):
        place = output.root.url.removeprefix(run.url)
        for name, entry in output.manifest.files.items():
            hashes[f"{place}/{name}"] = entry["sha256"]
        if SCORES in output.names():
            # Scores contain the paths of shards, and so the random names of attempts.
            shard = pl.col("shard").str.replace("/[0-9a-f]{12}/", "/")
            frame = read_frame(output, SCORES).with_columns(shard)
            hashes[f"{place}/{SCORES}"] = hashlib.sha256(frame.write_csv().encode()).hexdigest()
    return hashes


def _run_secateur(plan: str, log: str, environment: dict[str, str]) -> None:
    from secateur.flows import cli

    # The fork server keeps the environment of its own start.
    os.environ.update(environment)
    with open(log, "ab") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    sys.argv = ["secateur", "run", plan]
    cli.main()


def _plan(root: str, data: Path) -> dict[str, Any]:
    """Return a shortened plan of the image example."""
    plan: dict[str, Any] = yaml.safe_load(Path("examples/images/plan.yaml").read_text())
    plan |= {"run": "killed", "root": root, "segment_steps": 20, "threads": 1}
    plan["data"]["shards"] = f"{data}/train-{{000000..000001}}.tar"
    plan["targets"] = {"clean": {"shards": f"{data}/target-000000.tar"}}
    first, second = plan["stages"]
    plan["stages"] = [first | {"epochs": 1}, second | {"steps": 40}]
    plan.pop("audit")
    return plan


def _format_counts(counts: Counter[str]) -> str:
    return ", ".join(f"{name} {counts[name]}" for name in COUNTS)


if __name__ == "__main__":
    main()

"""Kills a run at random moments and holds what a resumed one comes to against an uninterrupted one.

    python -m benchmarks.kills [--kills 60] [--servers 5] [--store disk seaweedfs]

A two-stage plan on the image example's data runs through the command line. It is killed with -9 at moments spread evenly over
its artefacts, and so over its tasks, each drawn within its share of them; then the same command resumes it. (Its processes
are forked from one that has imported torch and Prefect, which spares most of an hour, and share a Prefect server such as a
command has of its own.) Every file that
the run committed is compared with the uninterrupted run's by its sha256, and the pruned shards sample by sample. SeaweedFS,
where it is the store, is killed the same way while the run goes on, and started again.
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
from secateur.storage.integrity import list_outputs, verify_folder
from secateur.storage.layout import RunFolder
from secateur.storage.shards import list_shards
from secateur.tasks.engine.prefect_server import prefect_server
from tests.servers import SeaweedFS

FORKS = get_context("forkserver")
SEED = 20
POLL = 0.2
SCORES = "scores.parquet"
NAMES = ("failed", "lost", "duplicated", "differing shards", "differing files", "damaged")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--servers", type=int, default=5)
    parser.add_argument(
        "--store", nargs="+", choices=["disk", "seaweedfs"], default=["disk", "seaweedfs"]
    )
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # leaves no server behind
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
        with prefect_server():  # for all runs: each would start its own
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
    """One store: the uninterrupted run, and every interrupted one, at the same place, held against it."""

    def __init__(self, folder: Path, root: str) -> None:
        self.folder, self.run = folder, Folder(f"{root}/killed")
        self.plan = folder / "plan.yaml"
        self.plan.write_text(yaml.safe_dump(_plan(root, folder / "data")))
        start, running = time.monotonic(), self._start()
        moments: list[float] = []
        self.seen: list[str] = []
        while running.is_alive():
            moments += [time.monotonic() - start] * self._look()
            time.sleep(POLL)
        assert running.exitcode == 0, (folder / "run.log").read_text()[-2000:]
        seconds = time.monotonic() - start
        self.gaps = [b - a for a, b in zip([0.0, *moments], [*moments, seconds], strict=True)]
        self.expected, self.keys = committed(self.run), self._keys()
        print(
            f"{self.run.url}: uninterrupted {seconds:.1f} s, {len(list_outputs(self.run))} artefacts of {len(self.expected)} "
            f"files, {len(self.keys)} samples kept",
            flush=True,
        )
        self.run.delete()

    def kills(self, count: int) -> None:
        """Kills the run at `count` moments."""
        total = Counter[str]()
        for moment in self._moments(count, SEED):
            start, running = time.monotonic(), self._start()
            self._reach(running, moment)
            running.kill()
            running.join()
            early = running.exitcode != -signal.SIGKILL
            told = f"{'ended before it was killed' if early else 'killed'} after {time.monotonic() - start:5.2f} s"
            total += self._resumed(f"{told}, {self._state()}")
        print(f"{self.run.url}: {count} kills: {_told(total)}", flush=True)

    def server_kills(self, count: int, server: SeaweedFS) -> None:
        """Kills the server in mid-run; the run may end with an error, and the same command must carry on."""
        total = Counter[str]()
        for moment in self._moments(count, SEED + 1):
            start, running = time.monotonic(), self._start()
            self._reach(running, moment)
            server.kill()
            seconds = time.monotonic() - start
            server.start()
            state = self._state()
            running.join()
            total += self._resumed(
                f"server killed after {seconds:5.2f} s, {state}; the run ended with {running.exitcode}"
            )
        print(f"{self.run.url}: {count} server kills: {_told(total)}", flush=True)

    def _moments(self, count: int, seed: int) -> list[tuple[int, float]]:
        """Moments as committed artefacts, and seconds after the last of them."""
        drawn, total = random.Random(seed), len(self.gaps)
        places = [total * (number + drawn.random()) / count for number in range(count)]
        drawn.shuffle(places)
        return [(int(place), (place - int(place)) * self.gaps[int(place)]) for place in places]

    def _reach(self, running: BaseProcess, moment: tuple[int, float]) -> None:
        """Waits for a moment, or the run's end."""
        self.seen = []
        while len(self.seen) < moment[0] and running.is_alive():
            self._look()
            time.sleep(POLL)
        running.join(moment[1])

    def _state(self) -> str:
        """What was committed, and how many files of unfinished attempts lie beside it."""
        self._look()
        last = self.seen[-1] if self.seen else "none"
        return f"{len(self.seen):2d} artefacts committed (the last {last}), {len(find_stray_files(self.run))} stray files"

    def _look(self) -> int:
        """Adds what was committed since to `seen`; an artefact may have served its purpose and be gone again."""
        found = {
            f.removesuffix("/manifest.json")
            for f in self.run.files()
            if f.endswith("/manifest.json")
        }
        new = sorted(found - set(self.seen))
        self.seen += new
        return len(new)

    def _keys(self) -> list[str]:
        """The keys in the pruned shards, read from the shards themselves."""
        pruned = RunFolder(self.run.url).stage(0).prune("plan")
        shards = [pruned.url(n) for n in pruned.names() if n.startswith("shards/")]
        return [key for shard in shards for key in list_shards([shard])["key"].to_list()]

    def _resumed(self, told: str) -> Counter[str]:
        running = self._start()
        running.join()
        code = running.exitcode
        files, keys = (committed(self.run), self._keys()) if code == 0 else ({}, [])
        differ = [
            name
            for name in files.keys() | self.expected.keys()
            if files.get(name) != self.expected.get(name)
        ]
        counts = (
            int(code != 0),
            len(set(self.keys) - set(keys)),
            len(keys) - len(set(keys)),
            sum("/shards/" in name for name in differ),
            len(differ),
            sum(f.what != "extra" for f in verify_folder(self.run)),
        )
        counted = Counter(dict(zip(NAMES, counts, strict=True)))
        print(
            f"  {told}: {_told(counted)}{''.join(f'; {name} differs' for name in differ)}",
            flush=True,
        )
        if code != 0:
            print((self.folder / "run.log").read_text()[-2000:], flush=True)
        self.run.delete()
        return counted

    def _start(self) -> BaseProcess:
        """`secateur run`, in a process of its own."""
        running = FORKS.Process(
            target=_secateur, args=(str(self.plan), str(self.folder / "run.log"), dict(os.environ))
        )
        running.start()
        return running


def committed(run: Folder) -> dict[str, str]:
    """The sha256 of every file of every artefact, by its name without the attempt; scores name shards by path, which
    holds the attempt's name, so it is taken out of them."""
    found: dict[str, str] = {}
    for artefact in list_outputs(run):
        place = artefact.root.url.removeprefix(run.url)
        found |= {
            f"{place}/{name}": facts["sha256"] for name, facts in artefact.manifest.files.items()
        }
        if SCORES in artefact.names():
            named = pl.col("shard").str.replace("/[0-9a-f]{12}/", "/")
            frame = read_frame(artefact, SCORES).with_columns(named)
            found[f"{place}/{SCORES}"] = hashlib.sha256(frame.write_csv().encode()).hexdigest()
    return found


def _secateur(plan: str, log: str, environment: dict[str, str]) -> None:
    from secateur.flows import cli

    os.environ.update(environment)
    with open(log, "ab") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    sys.argv = ["secateur", "run", plan]
    cli.main()


def _plan(root: str, data: Path) -> dict[str, Any]:
    """The image example, shortened."""
    plan: dict[str, Any] = yaml.safe_load(Path("examples/images/plan.yaml").read_text())
    plan |= {"run": "killed", "root": root, "segment_steps": 20, "threads": 1}
    plan["data"]["shards"] = f"{data}/train-{{000000..000001}}.tar"
    plan["targets"] = {"clean": {"shards": f"{data}/target-000000.tar"}}
    first, second = plan["stages"]
    plan["stages"] = [first | {"epochs": 1}, second | {"steps": 40}]
    plan.pop("audit")
    return plan


def _told(counted: Counter[str]) -> str:
    return ", ".join(f"{name} {counted[name]}" for name in NAMES)


if __name__ == "__main__":
    main()

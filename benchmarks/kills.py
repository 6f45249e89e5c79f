"""Kills a run at random moments and holds what a resumed one comes to against an uninterrupted one.

    python -m benchmarks.kills [--kills 60] [--servers 5] [--store disk seaweedfs]

A two-stage plan on the image example's data runs through the command line. Each time it is killed with -9 at a moment drawn
from the uninterrupted run's length, then resumed by the same command. The pruned shards are compared byte for byte.
SeaweedFS, where it is the store, is killed while the run writes, and started again.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import yaml

from examples.images.make_shards import make
from storage.integrity import verify
from storage.root import Root
from storage.run import RunFolder
from storage.shards import index_shards
from tests.servers import SeaweedFS

SEED = 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--servers", type=int, default=5)
    parser.add_argument("--store", nargs="+", choices=["disk", "seaweedfs"], default=["disk", "seaweedfs"])
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="kills-"))
    os.environ.update(OMP_NUM_THREADS="1", PREFECT_HOME=str(folder / "prefect"), SECATEUR_CACHE=str(folder / "cache"))
    try:
        make(str(folder / "data"), 0)
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
    """One store: the uninterrupted run, and every interrupted one held against it."""

    def __init__(self, folder: Path, root: str) -> None:
        self.folder, self.root = folder, root
        start = time.monotonic()
        self._start("whole").wait()
        self.seconds = time.monotonic() - start
        self.expected = self.outcome("whole")
        print(f"{root}: uninterrupted {self.seconds:.1f} s, {len(self.expected)} pruned shards", flush=True)

    def kills(self, count: int) -> None:
        """Kills the run at `count` moments, spread evenly over its length and each drawn within its share."""
        drawn, total = random.Random(SEED), Counter[str]()
        for number in range(count):
            moment = self.seconds * (number + drawn.random()) / count
            name = f"kill-{number}"
            running = self._start(name)
            time.sleep(moment)
            running.kill()
            running.wait()
            done = len([f for f in self._files(name) if f.endswith("manifest.json")])
            total += self._resumed(name, f"killed at {moment:5.2f} s with {done} artefacts")
        print(f"{self.root}: {count} kills: {_told(total)}", flush=True)

    def server_kills(self, count: int, server: SeaweedFS) -> None:
        """Kills the server in mid-run; the run may end with an error, and the same command must carry on."""
        drawn, total = random.Random(SEED + 1), Counter[str]()
        for number in range(count):
            moment = self.seconds * (number + drawn.random()) / count
            name = f"server-{number}"
            running = self._start(name)
            time.sleep(moment)
            server.kill()
            server.start()
            code = running.wait()
            total += self._resumed(name, f"server killed at {moment:5.2f} s; the run ended with {code}")
        print(f"{self.root}: {count} server kills: {_told(total)}", flush=True)

    def outcome(self, name: str) -> dict[str, tuple[bytes, list[str]]]:
        """The pruned shards: their sha256 and keys."""
        pruned = RunFolder(f"{self.root}/{name}").stage(0).prune("plan")
        shards = [n for n in pruned.names() if n.startswith("shards/")]
        return {n: (pruned.manifest.files[n]["sha256"], index_shards([pruned.url(n)])["key"].to_list()) for n in shards}

    def _resumed(self, name: str, told: str) -> Counter[str]:
        code = self._start(name).wait()
        found = self.outcome(name) if code == 0 else {}
        keys, expected = ([k for _, ks in shards.values() for k in ks] for shards in (found, self.expected))
        run = Root(f"{self.root}/{name}")
        damage = [f for f in verify(run) if f.what != "extra"]
        counted = Counter(
            failed=int(code != 0),
            lost=len(set(expected) - set(keys)),
            duplicated=len(keys) - len(set(keys)),
            differing=sum(found.get(n, (b"",))[0] != self.expected[n][0] for n in self.expected),
            damaged=len(damage),
        )
        print(f"  {told}: {_told(counted)}", flush=True)
        run.delete()
        return counted

    def _start(self, name: str) -> subprocess.Popen[bytes]:
        """The command, on a plan of this name."""
        path = self.folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(_plan(name, self.root, self.folder / "data")))
        with open(self.folder / "run.log", "ab") as log:
            return subprocess.Popen([sys.executable, "-m", "flows.cli", "run", str(path)], stdout=log, stderr=log)

    def _files(self, name: str) -> list[str]:
        return Root(f"{self.root}/{name}").files()


def _plan(name: str, root: str, data: Path) -> dict[str, Any]:
    """The image example, shortened."""
    plan: dict[str, Any] = yaml.safe_load(Path("examples/images/plan.yaml").read_text())
    plan |= {"run": name, "root": root, "segment_steps": 40, "threads": 1}
    plan["data"]["shards"] = f"{data}/train-{{000000..000003}}.tar"
    for target in plan["targets"].values():
        target["shards"] = f"{data}/{Path(target['shards']).name}"
    first, second = plan["stages"]
    plan["stages"] = [first | {"epochs": 1}, second | {"steps": 80}]
    plan.pop("audit")
    return plan


def _told(counted: Counter[str]) -> str:
    names = ("failed", "lost", "duplicated", "differing", "damaged")
    return ", ".join(f"{name} {counted[name]}" for name in names)


if __name__ == "__main__":
    main()

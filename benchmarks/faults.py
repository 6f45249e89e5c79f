"""Run a plan on SeaweedFS through a proxy that fails one request in twenty.

A failure is an error, a reset, a lost answer, or a stall of 30 s.

    python -m benchmarks.faults [--share 0.05] [--stall 30] [--seed 0]

Prints how many requests there were and how many failed, how many retries the run showed, how long
it took, and in how many files it differs from a run on the disk.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from secateur.storage.folder import Folder
from secateur.storage.integrity import verify_folder
from secateur.tasks.run import Run
from tests.proxy import KINDS, FaultyProxy
from tests.servers import SeaweedFS
from tests.tasks.small import curate_small, make_data, small_plan, values
from tests.tasks.test_run import differing

RUN = """
import json, sys
from secateur.tasks.plan import Plan
from tests.tasks.small import curate_small
curate_small(Plan.model_validate(json.loads(sys.argv[1])))
"""


def main() -> None:
    """Run the plan on the disk and through the proxy, and print the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--share", type=float, default=0.05, help="of the requests that fail")
    parser.add_argument("--stall", type=float, default=30.0, help="seconds")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        server = SeaweedFS(folder / "seaweed")
        os.environ["SECATEUR_CACHE"] = f"{name}/cache"
        make_data(folder)
        expected = curate_small(small_plan(folder))
        server.start()
        try:
            os.environ.update(server.environment)
            proxy = FaultyProxy(server.port, options.share, options.stall, options.seed)
            measure(folder, proxy, expected)
        finally:
            server.kill()


def measure(folder: Path, proxy: FaultyProxy, expected: Run) -> None:
    """Run the plan through the proxy, and compare it with a run on the disk."""
    plan = json.dumps(values(folder, root="s3://bucket/runs"))
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", RUN, plan],
        stderr=subprocess.PIPE,
        text=True,
        check=False,
        env=os.environ | {"AWS_ENDPOINT_URL": proxy.url},
    )
    seconds = time.monotonic() - start
    proxy.shutdown()
    assert done.returncode == 0, done.stderr[-3000:]
    kinds = ", ".join(f"{proxy.faults[kind]} {kind}" for kind in KINDS)
    failed = proxy.faults.total()
    print(f"{proxy.requests} requests, {failed} failed ({kinds}), in {seconds:.0f} s")
    print(f"{done.stderr.count('trying again')} retries shown")
    run = Run.open("s3://bucket/runs/small")
    findings = [finding for finding in verify_folder(Folder(run.url)) if finding.what != "extra"]
    print(f"{len(differing(expected, run))} differing files, {len(findings)} damaged")


if __name__ == "__main__":
    main()

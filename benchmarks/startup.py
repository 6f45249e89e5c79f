"""What Prefect costs `secateur run` where no server is configured: a finished run through the command line, beside the same
tasks called as plain functions, each in a process of its own.

    python -m benchmarks.startup [--repeats 5]

The run is finished, so that hardly anything but starting and ending is left. The first start makes Prefect's database. Seconds on
the clock, and of the processor: our process's with all its children's, the server's too.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.timing import spread
from secateur.tasks.plan.plan_file import plan_text
from tests.tasks.small import make_data, small_plan

PLAIN = """
import sys
from tasks.reading import read_plan
from tests.tasks.small import curate
curate(read_plan(sys.argv[1]))
"""
LIMIT = 8.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_data(folder)
        path = folder / "plan.yaml"
        path.write_text(plan_text(small_plan(folder)))
        plain, command = (
            [sys.executable, "-c", PLAIN, str(path)],
            [sys.executable, "-m", "secateur.flows.cli", "run", str(path)],
        )
        timed(plain, folder)
        first, cpu = timed(command, folder)
        base = timed(plain, folder)
        print(
            f"first start: {first - base[0]:.1f} s on the clock, {cpu - base[1]:.1f} s of the processor",
            flush=True,
        )
        clock, processor, ratios = [], [], []
        for _ in range(options.repeats):
            base, whole = timed(plain, folder), timed(command, folder)
            clock.append(whole[0] - base[0])
            processor.append(whole[1] - base[1])
            ratios.append(whole[0] / base[0])
    print(
        f"later starts: {spread(clock, 1)} s on the clock, {spread(processor, 1)} s of the processor"
    )
    print(f"the command over plain functions: {spread(ratios, 1)}")
    print(
        f"limit: {LIMIT:.0f} s; median {'within' if statistics.median(clock) <= LIMIT else 'beyond'} it"
    )


def timed(command: list[str], folder: Path) -> tuple[float, float]:
    """Seconds on the clock and of the processor."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    before, begun = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    done = subprocess.run(
        command,
        env=clean | {"PREFECT_HOME": str(folder / "home")},
        check=True,
        capture_output=True,
        text=True,
    )
    assert "Traceback" not in done.stderr, done.stderr
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return (
        time.monotonic() - begun,
        after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
    )


if __name__ == "__main__":
    main()

"""The cost of Prefect in `secateur run` if no server is configured.

It compares a finished run through the command line with the same tasks as plain functions. Each is
a process. The run is finished, so little but starting and ending is left. The first start creates
Prefect's database.

    python -m benchmarks.startup [--repeats 5]

It prints seconds on the clock, and of the processor: those of the process and of all its children,
the server included.
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

from benchmarks.timing import format_spread
from secateur.tasks.plan.plan_file import plan_text
from tests.tasks.small import make_data, small_plan

PLAIN = """
import sys
from secateur.tasks.plan.plan_file import read_plan
from tests.tasks.small import curate_small
curate_small(read_plan(sys.argv[1]))
"""
LIMIT = 8.0  # seconds
Times = tuple[float, float]  # seconds on the clock, and of the processor


def main() -> None:
    """Time both in turns, and print the differences."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_data(folder)
        path = folder / "plan.yaml"
        path.write_text(plan_text(small_plan(folder)))
        plain = [sys.executable, "-c", PLAIN, str(path)]
        command = [sys.executable, "-m", "secateur.flows.cli", "run", str(path)]
        # The first call trains.
        time_command(plain, folder)
        seconds, cpu = time_command(command, folder)
        plain_seconds, plain_cpu = time_command(plain, folder)
        clock, processor = seconds - plain_seconds, cpu - plain_cpu
        print(
            f"first start: {clock:.1f} s on the clock, {processor:.1f} s of the processor",
            flush=True,
        )
        pairs = [
            (time_command(plain, folder), time_command(command, folder))
            for _ in range(options.repeats)
        ]
    print_later_starts(pairs)


def print_later_starts(pairs: list[tuple[Times, Times]]) -> None:
    """Print how the command differs from plain functions, given the times of both, in pairs."""
    clock = [command[0] - plain[0] for plain, command in pairs]
    processor = [command[1] - plain[1] for plain, command in pairs]
    ratios = [command[0] / plain[0] for plain, command in pairs]
    spreads = format_spread(clock, 1), format_spread(processor, 1)
    print(f"later starts: {spreads[0]} s on the clock, {spreads[1]} s of the processor")
    print(f"the command over plain functions: {format_spread(ratios, 1)}")
    verdict = "within" if statistics.median(clock) <= LIMIT else "beyond"
    print(f"limit: {LIMIT:.0f} s; median {verdict} it")


def time_command(command: list[str], folder: Path) -> Times:
    """Run a command, and return its seconds on the clock and of the processor."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    start = time.monotonic()
    done = subprocess.run(
        command,
        env=clean | {"PREFECT_HOME": str(folder / "home")},
        check=True,
        capture_output=True,
        text=True,
    )
    assert "Traceback" not in done.stderr, done.stderr
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return time.monotonic() - start, cpu


if __name__ == "__main__":
    main()

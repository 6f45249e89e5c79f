"""The memory of a process: its resident set, now and at its peak (Linux only)."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

MEBIBYTE = 1 << 20
# The C library returns a block of this size or more as soon as it is free. By default the size
# grows as blocks are freed, and a peak is then also of what the heap keeps for later.
RETURNED_BLOCKS = 256 * 1024


def run_apart(module: str, *arguments: str) -> float:
    """Run a module in a new process, and return the number on the last line that it prints."""
    command = [sys.executable, "-m", module, *arguments]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(RETURNED_BLOCKS)}
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    return float(done.stdout.splitlines()[-1])


def measure_growth(run: Callable[[], object]) -> float:
    """Return by how many MiB the resident set grows while a function runs, at its peak."""
    gc.collect()
    _forget_peak()
    before = _resident_set("VmRSS")
    run()
    return (_resident_set("VmHWM") - before) / MEBIBYTE


def _forget_peak() -> None:
    """Let the kernel count this process's peak anew, without that of the imports."""
    Path("/proc/self/clear_refs").write_text("5")


def _resident_set(name: str) -> int:
    """Return the size of this process's memory (`VmRSS`) or its peak (`VmHWM`) in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))

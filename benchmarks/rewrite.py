"""Rewriting a shard without a third of its samples, beside `cp` of the same bytes on the same disk.

    python -m benchmarks.rewrite [--repeats 5] [--sizes 64 256 1024]

For each size (MiB) and repeat: the time of `cp` and of the rewriting, each ending with the file on the disk (fsync), the ratio of
their throughputs, and the memory that the rewriting took on top of what was held before. What `cp` copies is a shard of the
samples that stay, written as the whole one was (a file's pages are quicker to read the larger the writes that made them), and
the rewritten shard is compared with it. Both sources are in memory: a disk that is slower to read hides what the rewriting adds.
"""

from __future__ import annotations

import argparse
import io
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np

SAMPLE, MIB = 100_000, 1 << 20
MEASURED = """
import resource, sys, time
import numpy as np
from secateur.storage.outputs import Output
from secateur.storage.rewrite import rewrite_shards
from secateur.storage.folder import Folder
from secateur.storage.shards import list_shards
url, out = sys.argv[1:]
frame = list_shards([url])
keep = np.arange(len(frame)) % 3 != 0
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
start = time.perf_counter()
with Output(Folder(out)).attempt("prune", {}) as attempt:
    rewrite_shards(attempt, [url], frame, keep)
print(time.perf_counter() - start, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024, Output(Folder(out)).url("shards/a.tar"))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 256, 1024])
    parser.add_argument(
        "--folder", help="on the disk to measure; the system's temporary one otherwise"
    )
    options = parser.parse_args()
    print("MiB   of cp's throughput, median (least-greatest)   MiB/s   further memory, MiB")
    for size in options.sizes:
        ratios, speeds, memory = [], [], []
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            samples = range((size << 20) // SAMPLE)
            shard(Path(folder) / "a.tar", samples)
            shard(Path(folder) / "kept.tar", [number for number in samples if number % 3])
            for number in range(options.repeats):
                ours, extra, written = rewritten(folder, number)
                theirs = copied(f"{folder}/kept.tar", f"{folder}/copy-{number}")
                assert same(written, f"{folder}/kept.tar"), "it does not hold what stays"
                ratios.append(theirs / ours)
                speeds.append(os.path.getsize(written) / ours / 2**20)
                memory.append(extra)
                os.unlink(written)
                os.unlink(f"{folder}/copy-{number}")
        spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"
        print(
            f"{size:5d} {spread:>46} {statistics.median(speeds):7.0f} {max(memory):14.0f}",
            flush=True,
        )


def shard(path: Path, samples: Iterable[int]) -> None:
    """Samples of 100 kB of random bytes."""
    with tarfile.open(path, "w") as archive:
        for number in samples:
            info = tarfile.TarInfo(f"{number:08d}.bin")
            info.size = SAMPLE
            archive.addfile(info, io.BytesIO(np.random.default_rng(number).bytes(SAMPLE)))


def same(one: str, other: str) -> bool:
    """Whether two shards hold the same bytes, up to the zeros that end them."""
    with open(one, "rb") as first, open(other, "rb") as second:
        while (data := first.read(MIB)) == (held := second.read(MIB)):
            if not data:
                return True
        rest = data[len(held) :] + held[len(data) :] + first.read(MIB) + second.read(MIB)
        return data[: len(held)] == held[: len(data)] and not any(rest)


def rewritten(folder: str, number: int) -> tuple[float, float, str]:
    """Seconds and further MiB of a rewriting in a process of its own, and the file written."""
    command = [sys.executable, "-c", MEASURED, f"{folder}/a.tar", f"{folder}/out-{number}"]
    seconds, extra, written = subprocess.run(
        command, capture_output=True, text=True, check=True
    ).stdout.split()
    return float(seconds), float(extra), written


def copied(source: str, target: str) -> float:
    """Seconds of `cp`, with the file on the disk at the end."""
    start = time.perf_counter()
    subprocess.run(["cp", source, target], check=True)
    with open(target, "rb") as file:
        os.fsync(file.fileno())
    return time.perf_counter() - start


if __name__ == "__main__":
    main()

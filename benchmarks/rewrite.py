"""Rewriting a shard without a third of its samples, compared with `cp` of the same bytes.

    python -m benchmarks.rewrite [--repeats 5] [--sizes 64 256 1024]

For each size (MiB) and repeat it measures `cp` and the rewriting on the same disk. Both end with
the file on the disk (fsync). It prints the ratio of their throughputs, and the memory that the
rewriting needs in addition.

`cp` copies a shard of the kept samples, which is written in the same way as the whole shard: the
pages of a file are read faster if larger writes made them. The rewritten shard is compared with it.
Both sources are in memory, because a slower disk would hide the cost of the rewriting.
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

SAMPLE_BYTES = 100_000
MIB = 1 << 20
REWRITER = """
import resource, sys, time
import numpy as np
from secateur.storage.folder import Folder
from secateur.storage.outputs import Output
from secateur.storage.rewrite import rewrite_shards
from secateur.storage.shard_listing import list_shards
url, out = sys.argv[1:]
frame = list_shards([url])
keep = np.arange(len(frame)) % 3 != 0
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
start = time.perf_counter()
output = Output(Folder(out))
output.write_once("prune", {}, lambda attempt: rewrite_shards(attempt, [url], frame, keep))
seconds = time.perf_counter() - start
mebibytes = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
print(seconds, mebibytes, output.url("shards/a.tar"))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 256, 1024])
    parser.add_argument(
        "--folder", help="a folder on the disk to measure (default: the temporary folder)"
    )
    options = parser.parse_args()
    print("MiB   of cp's throughput, median (least-greatest)   MiB/s   additional memory, MiB")
    for size in options.sizes:
        ratios = []
        speeds = []
        memory = []
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            samples = range((size << 20) // SAMPLE_BYTES)
            write_shard(Path(folder) / "a.tar", samples)
            write_shard(Path(folder) / "kept.tar", [number for number in samples if number % 3])
            for number in range(options.repeats):
                seconds, mebibytes, path = time_rewriting(folder, number)
                copy_seconds = time_copying(f"{folder}/kept.tar", f"{folder}/copy-{number}")
                assert equal_shards(path, f"{folder}/kept.tar"), "the rewritten shard is wrong"
                ratios.append(copy_seconds / seconds)
                speeds.append(os.path.getsize(path) / seconds / MIB)
                memory.append(mebibytes)
                os.unlink(path)
                os.unlink(f"{folder}/copy-{number}")
        spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"
        print(
            f"{size:5d} {spread:>46} {statistics.median(speeds):7.0f} {max(memory):14.0f}",
            flush=True,
        )


def write_shard(path: Path, samples: Iterable[int]) -> None:
    """Write a shard whose samples are 100 kB of random bytes."""
    with tarfile.open(path, "w") as archive:
        for number in samples:
            info = tarfile.TarInfo(f"{number:08d}.bin")
            info.size = SAMPLE_BYTES
            archive.addfile(info, io.BytesIO(np.random.default_rng(number).bytes(SAMPLE_BYTES)))


def equal_shards(one: str, other: str) -> bool:
    """Check whether two shards have the same bytes up to the zeros at their ends."""
    with open(one, "rb") as first, open(other, "rb") as second:
        while (data := first.read(MIB)) == (other_data := second.read(MIB)):
            if not data:
                return True
        length = min(len(data), len(other_data))
        rest = data[length:] + other_data[length:] + first.read(MIB) + second.read(MIB)
        return data[:length] == other_data[:length] and not any(rest)


def time_rewriting(folder: str, number: int) -> tuple[float, float, str]:
    """Rewrite the shard in a new process.

    Returns:
        Its seconds and additional MiB of memory, and the path of the rewritten shard.
    """
    command = [sys.executable, "-c", REWRITER, f"{folder}/a.tar", f"{folder}/out-{number}"]
    process = subprocess.run(command, capture_output=True, text=True, check=True)
    seconds, mebibytes, path = process.stdout.split()
    return float(seconds), float(mebibytes), path


def time_copying(source: str, target: str) -> float:
    """Copy a file with `cp` and flush it to the disk, and return the seconds."""
    start = time.perf_counter()
    subprocess.run(["cp", source, target], check=True)
    with open(target, "rb") as file:
        os.fsync(file.fileno())
    return time.perf_counter() - start


if __name__ == "__main__":
    main()

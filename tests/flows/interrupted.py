"""The `secateur` command with slow writing of pruned shards, for tests that interrupt it.

It creates the file named by the variable `WRITING` when it is about to finish the first shard.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import IO

from secateur.flows import cli
from secateur.storage import rewrite

read = rewrite._read


def read_slowly(source: IO[bytes], buffer: memoryview, url: str) -> int:
    """Read as usual, and wait five minutes at the end of a shard."""
    size = read(source, buffer, url)
    if not size:
        Path(os.environ["WRITING"]).touch()
        # Short sleeps, because an interruption reaches a thread between two instructions.
        for _ in range(3000):
            time.sleep(0.1)
    return size


rewrite._read = read_slowly
cli.main()

"""`secateur`, but the pruned shards are written slowly, and a file says that it has begun: for tests that interrupt it."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import IO

from secateur.flows import cli

read = rewrite._read


def slowly(source: IO[bytes], buffer: memoryview, url: str) -> int:
    size = read(source, buffer, url)
    if not size:
        Path(os.environ["WRITING"]).touch()
        for _ in range(3000):  # an interruption reaches a thread between two instructions
            time.sleep(0.1)
    return size


rewrite._read = slowly
cli.main()

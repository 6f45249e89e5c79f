"""`secateur`, but the pruned shards are written slowly, and a file says that it has begun: for tests that interrupt it."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import IO

import storage.rewrite
from flows import cli

read = storage.rewrite._read


def slowly(source: IO[bytes], url: str) -> bytes:
    data = read(source, url)
    if not data:
        Path(os.environ["WRITING"]).touch()
        time.sleep(300)
    return data


storage.rewrite._read = slowly
cli.main()

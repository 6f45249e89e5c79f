"""Writing WebDataset shards whose bytes depend on their content alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import webdataset


def write_shards(pattern: str, samples: Sequence[dict[str, Any]], count: int) -> None:
    """Writes samples in order to `count` shards, as equal as can be; `pattern` takes the shard's number."""
    Path(pattern).parent.mkdir(parents=True, exist_ok=True)
    size = -(-len(samples) // count)
    for number in range(count):
        with webdataset.TarWriter(pattern % number, mtime=0) as writer:
            for sample in samples[number * size : (number + 1) * size]:
                writer.write(sample)

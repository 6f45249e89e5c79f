"""Write WebDataset shards whose bytes depend only on their content."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import webdataset


def write_shards(pattern: str, samples: Sequence[dict[str, Any]], count: int) -> None:
    """Write samples in order to `count` shards of nearly equal size.

    Args:
        pattern: path of a shard, with a place for its number (`train-%06d.tar`).
    """
    Path(pattern).parent.mkdir(parents=True, exist_ok=True)
    size = -(-len(samples) // count)
    for number in range(count):
        with webdataset.TarWriter(pattern % number, mtime=0) as writer:
            for sample in samples[number * size : (number + 1) * size]:
                writer.write(sample)

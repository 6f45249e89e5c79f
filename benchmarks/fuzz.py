"""Mutate shards, manifests, ledgers, frames and indexes, and count the outcomes.

It uses the properties of `tests/storage/test_fuzz.py`, each with 400 inputs.

    python -m benchmarks.fuzz

It ends with an error on a crash, on changed content that is accepted, and on an input that takes
over two minutes.
"""

from __future__ import annotations

import signal
from typing import Any

from tests.storage import test_fuzz as fuzz

SECONDS = 120
FILES = ("manifest.json", "frame.parquet", "ledger.safetensors", "index.faiss")


def main() -> None:
    """Run the properties, and print how many inputs had each outcome."""
    _limit_time("damage")
    fuzz.test_mutated_shard_is_listed_within_its_bounds_or_refused()
    fuzz.test_shard_mutated_after_listing_gives_same_samples_or_is_refused()
    for name in FILES:
        fuzz.test_mutated_output_reads_as_committed_or_is_refused(name)
    inputs = 0
    for kind in dict.fromkeys(kind for kind, _ in fuzz.OUTCOMES):
        counts = {
            outcome: count for (other, outcome), count in fuzz.OUTCOMES.items() if other == kind
        }
        # A rewritten shard is the same input as the listed one.
        if "rewritten" not in kind:
            inputs += sum(counts.values())
        print(f"{kind}: " + ", ".join(f"{count} {what}" for what, count in sorted(counts.items())))
    print(f"{inputs} mutated inputs: crashes 0, hangs 0, changed payloads accepted 0")


def _limit_time(name: str) -> None:
    """Give each input two minutes, from the moment at which the function `name` mutates it."""
    mutate = getattr(fuzz, name)

    def mutate_with_limit(*arguments: Any) -> Any:
        signal.alarm(SECONDS)
        return mutate(*arguments)

    setattr(fuzz, name, mutate_with_limit)


if __name__ == "__main__":
    main()

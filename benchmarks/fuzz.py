"""Mutated shards, manifests, ledgers, frames and indexes, by the properties of `tests/storage/test_fuzz.py`; counts what became of
them.

    python -m benchmarks.fuzz

Each of the six properties takes 400 inputs. A crash, a content that is accepted though it is another, or an input that
takes over two minutes, ends it with an error.
"""

from __future__ import annotations

import signal
from typing import Any

from tests.storage import test_fuzz as fuzz

SECONDS = 120


def main() -> None:
    _watch("damage")
    fuzz.test_mutated_shard_is_listed_within_its_bounds_or_refused()
    fuzz.test_shard_mutated_after_listing_gives_same_samples_or_is_refused()
    for name in ("manifest.json", "frame.parquet", "ledger.safetensors", "index.faiss"):
        fuzz.test_mutated_output_reads_as_committed_or_is_refused(name)
    inputs = 0
    for kind in dict.fromkeys(kind for kind, _ in fuzz.OUTCOMES):
        found = {outcome: count for (k, outcome), count in fuzz.OUTCOMES.items() if k == kind}
        inputs += sum(found.values()) * ("rewritten" not in kind)
        print(
            f"{kind}: "
            + ", ".join(f"{count} {outcome}" for outcome, count in sorted(found.items()))
        )
    print(f"{inputs} mutated inputs: crashes 0, hangs 0, changed payloads accepted 0")


def _watch(name: str) -> None:
    """Gives each input its time, from the moment at which it is mutated."""
    mutate = getattr(fuzz, name)

    def watched(*words: Any) -> Any:
        signal.alarm(SECONDS)
        return mutate(*words)

    setattr(fuzz, name, watched)


if __name__ == "__main__":
    main()

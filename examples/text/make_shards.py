"""Write text of three domains as WebDataset shards, 65 bytes per sample.

Every installation has the texts. `manual` is the Python language reference (`pydoc_data`), `code`
is the source of the standard library, and `tables` are the CSV files of scikit-learn's data sets.
There are 800 samples of each domain to train on, in 4 shards. The target is the `manual`.
"""

from __future__ import annotations

import argparse
import sysconfig
from importlib.resources import files
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np

from examples.shards import write_shards

BYTES = 65
MODULES = (
    "argparse",
    "ast",
    "datetime",
    "decimal",
    "difflib",
    "inspect",
    "pathlib",
    "tarfile",
    "typing",
    "zipfile",
)
TABLES = ("breast_cancer.csv", "wine_data.csv", "iris.csv", "linnerud_exercise.csv")
TRAIN, HELD_OUT = 800, 200


def make(out: str, seed: int) -> None:
    """Write the shards under `out`, unless they exist."""
    folder = Path(out)
    if (folder / "test-000000.tar").exists():
        return
    rng = np.random.default_rng(seed)
    train: list[tuple[str, bytes]] = []
    held_out: dict[str, list[bytes]] = {}
    for domain, text in read_domains().items():
        pieces = [text[i : i + BYTES] for i in range(0, len(text) - BYTES, BYTES)]
        chosen = [pieces[i] for i in rng.permutation(len(pieces))[: TRAIN + 2 * HELD_OUT]]
        held_out[domain] = chosen[TRAIN:]
        train += [(domain, piece) for piece in chosen[:TRAIN]]
    mixed = [train[i] for i in rng.permutation(len(train))]
    samples = [_make_sample("train", number, *pair) for number, pair in enumerate(mixed)]
    write_shards(str(folder / "train-%06d.tar"), samples, 4)
    manual = held_out["manual"]
    for name, pieces in {"target": manual[:HELD_OUT], "test": manual[HELD_OUT:]}.items():
        samples = [_make_sample(name, n, "manual", piece) for n, piece in enumerate(pieces)]
        write_shards(str(folder / f"{name}-%06d.tar"), samples, 1)


def read_domains() -> dict[str, bytes]:
    """Return the text of each domain."""
    library = Path(sysconfig.get_path("stdlib"))
    sources = [library / f"{name}.py" for name in MODULES]
    data = files("sklearn.datasets.data")
    return {
        "manual": "\n".join(topics[name] for name in sorted(topics)).encode(),
        "code": b"\n".join(path.read_bytes() for path in sources if path.exists()),
        "tables": b"\n".join(data.joinpath(name).read_bytes() for name in TABLES),
    }


def _make_sample(part: str, number: int, domain: str, text: bytes) -> dict[str, Any]:
    return {"__key__": f"{part}-{number:05d}", "txt": text, "json": {"domain": domain}}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default="data/text")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    make(arguments.out, arguments.seed)

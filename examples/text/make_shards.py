"""Text of three domains that every installation has, as WebDataset shards of 65 bytes a sample.

`manual`: the Python language reference (`pydoc_data`); `code`: the standard library's own sources; `tables`: the CSV
files of scikit-learn's data sets. 800 samples of each to train, in 4 shards; the target is the `manual`.
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
    """Writes the shards under `out`, unless they are there."""
    folder = Path(out)
    if (folder / "test-000000.tar").exists():
        return
    rng = np.random.default_rng(seed)
    train, held_out = [], {}
    for domain, text in domains().items():
        pieces = [text[i : i + BYTES] for i in range(0, len(text) - BYTES, BYTES)]
        chosen = [pieces[i] for i in rng.permutation(len(pieces))[: TRAIN + 2 * HELD_OUT]]
        held_out[domain] = chosen[TRAIN:]
        train += [(domain, piece) for piece in chosen[:TRAIN]]
    mixed = [train[i] for i in rng.permutation(len(train))]
    write_shards(
        str(folder / "train-%06d.tar"), [_sample("train", n, *s) for n, s in enumerate(mixed)], 4
    )
    parts = {"target": held_out["manual"][:HELD_OUT], "test": held_out["manual"][HELD_OUT:]}
    for name, pieces in parts.items():
        samples = [_sample(name, n, "manual", piece) for n, piece in enumerate(pieces)]
        write_shards(str(folder / f"{name}-%06d.tar"), samples, 1)


def domains() -> dict[str, bytes]:
    """Each domain's text."""
    library = Path(sysconfig.get_path("stdlib"))
    data = files("sklearn.datasets.data")
    tables = [data.joinpath(name).read_bytes() for name in TABLES]
    return {
        "manual": "\n".join(topics[name] for name in sorted(topics)).encode(),
        "code": b"\n".join(
            (library / f"{name}.py").read_bytes()
            for name in MODULES
            if (library / f"{name}.py").exists()
        ),
        "tables": b"\n".join(tables),
    }


def _sample(part: str, number: int, domain: str, text: bytes) -> dict[str, Any]:
    return {"__key__": f"{part}-{number:05d}", "txt": text, "json": {"domain": domain}}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default="data/text")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    make(arguments.out, arguments.seed)

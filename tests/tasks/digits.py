"""The learning task and the model of the small project.

Processes that tests start import only this, because scikit-learn and Prefect take seconds.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional


class Digits:
    """Reads `raw` images and `cls` labels. A label of `nan` has a loss that is not finite."""

    def collate(self, samples: list[dict[str, Any]]) -> dict[str, Tensor]:
        pixels = np.stack([np.frombuffer(s["raw"], np.float32).reshape(64) for s in samples])
        labels = [float(s["cls"]) for s in samples]
        return {"x": torch.from_numpy(pixels), "y": torch.tensor(labels)}

    def losses(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        x = batch["x"].to(next(model.parameters()).dtype)
        losses = functional.cross_entropy(
            model(x), batch["y"].nan_to_num().long(), reduction="none"
        )
        return torch.where(batch["y"].isnan(), torch.nan, losses)

    def sizes(self, batch: dict[str, Tensor]) -> Tensor:
        return 1 + batch["y"]

    def metrics(self, model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        x = batch["x"].to(next(model.parameters()).dtype)
        return {"accuracy": (model(x).argmax(1) == batch["y"]).float()}

    def sampled(self, model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        x = batch["x"].to(next(model.parameters()).dtype)
        return batch | {"y": torch.distributions.Categorical(logits=model(x)).sample().float()}


class Plain(Digits):
    """A task that cannot sample labels."""

    sampled = None  # type: ignore[assignment]


class Averaged(Digits):
    """A task that returns one loss per batch, where one per sample is needed."""

    def losses(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return super().losses(model, batch).mean()


def network(dropout: float = 0.1, uncaptured: bool = False, width: int = 12) -> nn.Module:
    """Return a 64-12-10 network. Its dropout makes steps depend on their random draws."""
    layers = [nn.Linear(64, width), nn.Tanh(), nn.Dropout(dropout), nn.Linear(width, 10)]
    return nn.Sequential(*layers, *([nn.PReLU()] if uncaptured else []))


def linear() -> nn.Module:
    """Return a model that is linear in its parameters."""
    return nn.Sequential(nn.Linear(64, 10))

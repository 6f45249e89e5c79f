"""The learning task of the image example: image samples become tensors and losses."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional


class Digits:
    """28 x 28 gray images (`.png`) with a label (`.cls`), and cross-entropy."""

    def collate(self, samples: list[dict[str, Any]]) -> dict[str, Tensor]:
        """Return `images` from 0 to 1, flat, and `labels`."""
        images = np.stack(
            [np.asarray(Image.open(io.BytesIO(s["png"])).convert("L")) for s in samples]
        )
        labels = [int(s["cls"]) for s in samples]
        return {
            "images": torch.from_numpy(images).float().flatten(1) / 255,
            "labels": torch.tensor(labels),
        }

    def losses(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """Return the cross-entropy of each image."""
        return functional.cross_entropy(_logits(model, batch), batch["labels"], reduction="none")

    def metrics(self, model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return whether each image is classified correctly."""
        return {"accuracy": (_logits(model, batch).argmax(1) == batch["labels"]).float()}


def _logits(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    # The plan's `dtype` is that of the parameters. A loss in half precision would be too coarse.
    logits: Tensor = model(batch["images"].to(next(model.parameters()).dtype))
    return logits.to(torch.promote_types(logits.dtype, torch.float32))

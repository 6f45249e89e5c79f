"""The learning task of the text example: text samples become tensors and losses."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


class NextByte:
    """Texts of equal length (`.txt`), and the mean cross-entropy of each next byte."""

    def collate(self, samples: list[dict[str, Any]]) -> dict[str, Tensor]:
        """Return `bytes` (batch, length)."""
        texts = [torch.frombuffer(bytearray(s["txt"]), dtype=torch.uint8) for s in samples]
        return {"bytes": torch.stack(texts).long()}

    def losses(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """Return the nats per byte of each sample."""
        logits = model(batch["bytes"][:, :-1]).transpose(1, 2)
        losses = functional.cross_entropy(logits, batch["bytes"][:, 1:], reduction="none")
        return losses.mean(1)

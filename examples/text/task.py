"""How a text sample becomes tensors and a loss."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


class NextByte:
    """Text of equal length (`.txt`); the mean cross-entropy of each next byte."""

    def collate(self, samples: list[dict[str, Any]]) -> dict[str, Tensor]:
        """`bytes`, batch by length."""
        return {
            "bytes": torch.stack(
                [torch.frombuffer(bytearray(s["txt"]), dtype=torch.uint8) for s in samples]
            ).long()
        }

    def losses(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """Nats a byte, for each sample."""
        logits = model(batch["bytes"][:, :-1])
        return functional.cross_entropy(
            logits.transpose(1, 2), batch["bytes"][:, 1:], reduction="none"
        ).mean(1)

"""A small byte-level transformer."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


class Attention(nn.Module):
    """Causal self-attention."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.into = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Mix each position with the ones before it."""
        query, key, value = self.into(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        out: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return out


class Layer(nn.Module):
    """Attention and a perceptron, each after a normalization and with a residual connection."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.norm2 = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.perceptron = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Apply both to every position."""
        x = x + self.attention(self.norm1(x))
        added: Tensor = self.perceptron(self.norm2(x))
        return x + added


class Transformer(nn.Module):
    """Predicts each next byte of texts (batch, positions). If `tied`, the head is the embedding."""

    def __init__(
        self, width: int = 64, heads: int = 4, layers: int = 2, context: int = 64, tied: bool = True
    ) -> None:
        super().__init__()
        self.bytes = nn.Embedding(256, width)
        self.positions = nn.Embedding(context, width)
        self.layers = nn.Sequential(*(Layer(width, heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 256, bias=False)
        for table in (self.bytes, self.positions):
            nn.init.normal_(table.weight, std=0.05)
        if tied:
            self.head.weight = self.bytes.weight

    def forward(self, ids: Tensor) -> Tensor:
        """Return the logits of the byte after each position."""
        places = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        logits: Tensor = self.head(self.norm(self.layers(self.bytes(ids) + self.positions(places))))
        return logits

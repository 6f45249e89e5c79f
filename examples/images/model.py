"""The model of the image example."""

from __future__ import annotations

from torch import nn


def mlp(hidden: int = 128) -> nn.Module:
    """Make a perceptron of 784 pixels, one hidden layer and ten classes."""
    return nn.Sequential(nn.Linear(784, hidden), nn.GELU(), nn.Linear(hidden, 10))

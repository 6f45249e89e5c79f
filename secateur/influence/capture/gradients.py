"""Gradients with respect to parameters that leave `.grad` as it is."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


def parameter_gradients(loss: Tensor, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    """Return the gradient of a loss for each parameter, zero if it has none.

    Works under reentrant checkpointing too, which does not take part in `torch.autograd.grad`.
    """
    kept = [p.grad for p in parameters]
    try:
        for parameter in parameters:
            parameter.grad = None
        loss.backward()
        found = [p.grad for p in parameters]
    finally:
        for parameter, gradient in zip(parameters, kept, strict=True):
            parameter.grad = gradient
    return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]

"""Gradients with respect to parameters that leave `.grad` as it is."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


def parameter_gradients(loss: Tensor, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    """Return the gradient of a loss for each parameter, zero if it has none."""
    trained = [p for p in parameters if p.requires_grad]
    found = _gradients_by_grad(loss, trained)
    # Under DistributedDataParallel, `backward` would wait for the other processes.
    if any(g is None for g in found) and not torch.distributed.is_initialized():
        found = gradients_by_backward(loss, trained)
    by_parameter = {p: g for p, g in zip(trained, found, strict=True) if g is not None}
    return [by_parameter[p] if p in by_parameter else torch.zeros_like(p) for p in parameters]


def _gradients_by_grad(loss: Tensor, parameters: Sequence[nn.Parameter]) -> Sequence[Tensor | None]:
    """Return gradients without `backward`; None where reentrant checkpointing may hide them."""
    try:
        return torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    except RuntimeError:
        # It refuses `grad` if a parameter is read before it.
        if torch.distributed.is_initialized():
            raise
        return [None] * len(parameters)


def gradients_by_backward(loss: Tensor, parameters: Sequence[nn.Parameter]) -> tuple[Tensor, ...]:
    """The same under reentrant checkpointing, which takes no part in `torch.autograd.grad`."""
    kept = [p.grad for p in parameters]
    try:
        for parameter in parameters:
            parameter.grad = None
        loss.backward()
        found = [p.grad for p in parameters]
    finally:
        for parameter, gradient in zip(parameters, kept, strict=True):
            parameter.grad = gradient
    return tuple(
        torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)
    )

"""Gradients with respect to parameters that leave `.grad` as it is."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


def parameter_gradients(loss: Tensor, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    """Return the gradient of a loss for each parameter, zero if it has none."""
    trained = [p for p in parameters if p.requires_grad]
    # Under DistributedDataParallel, `backward` would wait for the other processes.
    alone = not torch.distributed.is_initialized()
    found: Sequence[Tensor | None] = [None]
    if not (alone and is_reentrant(loss)):
        found = torch.autograd.grad(loss, trained, retain_graph=True, allow_unused=True)
    if alone and any(g is None for g in found):
        # Reentrant checkpointing hides its parameters from `grad`, or refuses it.
        found = gradients_by_backward(loss, trained)
    by_parameter = {p: g for p, g in zip(trained, found, strict=True) if g is not None}
    return [by_parameter[p] if p in by_parameter else torch.zeros_like(p) for p in parameters]


def is_reentrant(loss: Tensor) -> bool:
    """Check whether reentrant checkpointing takes part in a loss. `grad` then refuses it."""
    waiting = [loss.grad_fn]
    seen = set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        if node.name() == "CheckpointFunctionBackward":
            return True
        seen.add(node)
        waiting += [function for function, _ in node.next_functions]
    return False


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

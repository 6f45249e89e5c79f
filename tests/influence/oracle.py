"""Independent oracles: autograd one sample at a time, and contributions captured in one pass."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from secateur.influence.bindings import Bindings, bind_layers
from secateur.influence.coordinate_basis import CoordinateBasis
from secateur.influence.hooks import sample_gradients

Losses = Callable[[nn.Module, Tensor], Tensor]


def everything(bindings: Bindings) -> CoordinateBasis:
    """Return the basis of all parameters."""
    return CoordinateBasis(bindings.blocks, [torch.arange(block.size) for block in bindings.blocks])


def captured(model: nn.Module, losses: Losses, inputs: Tensor) -> Tensor:
    """Return the contributions `batch parameters` by hooks, in the order of the blocks."""
    bindings = bind_layers(model)
    return sample_gradients(
        lambda rows: losses(model, inputs[rows]), len(inputs), bindings, everything(bindings)
    )[0]


def one_by_one(model: nn.Module, losses: Losses, inputs: Tensor) -> Tensor:
    """Return the same by autograd, each sample alone."""
    bindings = bind_layers(model)
    basis = everything(bindings)
    rows = []
    for i in range(len(inputs)):
        model.zero_grad()
        losses(model, inputs[i : i + 1]).sum().backward()
        gradients = {
            n: torch.zeros_like(p) if p.grad is None else p.grad
            for n, p in model.named_parameters()
        }
        rows.append(basis.project_tensors(gradients))
    return torch.stack(rows)


def relative(actual: Tensor, expected: Tensor) -> float:
    """Return the distance relative to the expected norm."""
    return float((actual - expected).norm() / expected.norm())

"""Adagrad: theta and the sum of squared gradients."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from secateur.influence.optimizers.registry import register_update_rule
from secateur.influence.optimizers.update_rule import Hyperparameters, UpdateRule, add_weight_decay


@register_update_rule(torch.optim.Adagrad)
class AdagradUpdate(UpdateRule):
    """`torch.optim.Adagrad`: decay of the rate, weight decay added to the gradient, maximize.

    The sum begins at `initial_accumulator_value`, which torch puts into the state before the first
    step.
    """

    hyper = ("lr", "lr_decay", "eps", "weight_decay", "maximize", "step")
    slots = ("sum",)

    def initial_state(self, group: Mapping[str, Any], parameter: Tensor) -> dict[str, Tensor]:
        total = torch.full_like(parameter, group["initial_accumulator_value"])
        return {"step": torch.tensor(0.0), "sum": total}

    def update(self, state: Tensor, grad: Tensor, h: Hyperparameters) -> Tensor:
        theta, total = state
        grad = add_weight_decay(theta, grad * (1 - 2 * h["maximize"]), h)
        total = total + grad.square()
        rate = h["lr"] / (1 + (h["step"] - 1) * h["lr_decay"])
        return torch.stack([theta - rate * grad / (total.sqrt() + h["eps"]), total])

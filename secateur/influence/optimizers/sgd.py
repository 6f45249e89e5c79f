"""Stochastic gradient descent."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from secateur.influence.optimizers.registry import register_update_rule
from secateur.influence.optimizers.update_rule import (
    Hyperparameters,
    ParameterGroups,
    UpdateRule,
)


@register_update_rule(torch.optim.SGD)
class SGDUpdate(UpdateRule):
    """`torch.optim.SGD`: weight decay, momentum, dampening, Nesterov, maximize."""

    hyper = ("lr", "momentum", "dampening", "weight_decay", "nesterov", "maximize", "first")
    linear = True

    def __init__(self, momentum: bool) -> None:
        self.slots = ("momentum_buffer",) if momentum else ()

    @classmethod
    def from_groups(cls, groups: ParameterGroups) -> UpdateRule:
        return cls(momentum=any(group.get("momentum") for group in groups))

    def settings(self, group: Mapping[str, Any], state: Mapping[str, Any]) -> list[float]:
        return super().settings(dict(group, first=state.get("momentum_buffer") is None), state)

    def update(self, state: Tensor, grad: Tensor, h: Hyperparameters) -> Tensor:
        grad = grad * (1 - 2 * h["maximize"]) + h["weight_decay"] * state[0]
        if not self.slots:
            return torch.stack([state[0] - h["lr"] * grad])
        moving = h["momentum"] * state[1] + (1 - h["dampening"]) * grad
        # At the first step torch copies the gradient into the buffer, without dampening.
        buffer = h["first"] * grad + (1 - h["first"]) * moving
        # A group without momentum has no buffer, although other groups of the optimizer have one.
        buffer = torch.where(h["momentum"] == 0, grad, buffer)
        direction = buffer + h["nesterov"] * (grad + (h["momentum"] - 1) * buffer)
        return torch.stack([state[0] - h["lr"] * direction, buffer])

"""RMSProp."""

from __future__ import annotations

import torch
from torch import Tensor

from secateur.influence.optimizers.registry import register_update_rule
from secateur.influence.optimizers.update_rule import (
    Hyperparameters,
    ParameterGroups,
    UpdateRule,
    refuse_option,
)


@register_update_rule(torch.optim.RMSprop)
class RMSpropUpdate(UpdateRule):
    """`torch.optim.RMSprop`: epsilon, weight decay added to the gradient, momentum, maximize.

    `centered` is refused.
    """

    hyper = ("lr", "alpha", "eps", "weight_decay", "momentum", "maximize")

    def __init__(self, momentum: bool) -> None:
        self.slots = ("square_avg", "momentum_buffer") if momentum else ("square_avg",)

    @classmethod
    def from_groups(cls, groups: ParameterGroups) -> UpdateRule:
        refuse_option(groups, "centered")
        return cls(momentum=any(group.get("momentum") for group in groups))

    def update(self, state: Tensor, grad: Tensor, h: Hyperparameters) -> Tensor:
        grad = grad * (1 - 2 * h["maximize"]) + h["weight_decay"] * state[0]
        square = h["alpha"] * state[1] + (1 - h["alpha"]) * grad.square()
        direction = grad / (square.sqrt() + h["eps"])
        if len(self.slots) == 1:
            return torch.stack([state[0] - h["lr"] * direction, square])
        buffer = h["momentum"] * state[2] + direction
        return torch.stack([state[0] - h["lr"] * buffer, square, buffer])

"""RMSProp."""

from __future__ import annotations

import torch
from torch import Tensor

from secateur.influence.optimizers.registry import register_update_rule
from secateur.influence.optimizers.update_rule import (
    Hyperparameters,
    ParameterGroups,
    UpdateRule,
    add_weight_decay,
)


@register_update_rule(torch.optim.RMSprop)
class RMSpropUpdate(UpdateRule):
    """`torch.optim.RMSprop`: weight decay added to the gradient, momentum, centered, maximize.

    Args:
        momentum: whether any group has momentum.
        centered: whether any group subtracts the mean gradient's square from the mean square.
    """

    hyper = ("lr", "alpha", "eps", "weight_decay", "momentum", "centered", "maximize")

    def __init__(self, momentum: bool, centered: bool) -> None:
        optional = {"momentum_buffer": momentum, "grad_avg": centered}
        self.slots = ("square_avg", *(name for name, used in optional.items() if used))

    @classmethod
    def from_groups(cls, groups: ParameterGroups) -> UpdateRule:
        return cls(
            momentum=any(group.get("momentum") for group in groups),
            centered=any(group.get("centered") for group in groups),
        )

    def update(self, state: Tensor, grad: Tensor, h: Hyperparameters) -> Tensor:
        slots = dict(zip(self.slots, state[1:], strict=True))
        grad = add_weight_decay(state[0], grad * (1 - 2 * h["maximize"]), h)
        square = h["alpha"] * slots["square_avg"] + (1 - h["alpha"]) * grad.square()
        slots["square_avg"] = square
        if "grad_avg" in slots:
            mean = h["alpha"] * slots["grad_avg"] + (1 - h["alpha"]) * grad
            slots["grad_avg"] = mean
            # A group that is not centered has no mean, although other groups have one.
            square = square - h["centered"] * mean.square()
        direction = grad / (square.sqrt() + h["eps"])
        if "momentum_buffer" in slots:
            direction = h["momentum"] * slots["momentum_buffer"] + direction
            slots["momentum_buffer"] = direction
        return torch.stack([state[0] - h["lr"] * direction, *slots.values()])

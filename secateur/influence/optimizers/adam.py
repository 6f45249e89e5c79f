"""Adam and AdamW: theta and both moments."""

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


@register_update_rule(torch.optim.Adam)
class AdamUpdate(UpdateRule):
    """`torch.optim.Adam`: bias correction, epsilon, weight decay added to the gradient, maximize.

    `amsgrad` is refused. With `decoupled_weight_decay` the rule is AdamW's.
    """

    hyper = ("lr", "beta1", "beta2", "eps", "weight_decay", "maximize", "step")
    slots = ("exp_avg", "exp_avg_sq")

    @classmethod
    def from_groups(cls, groups: ParameterGroups) -> UpdateRule:
        refuse_option(groups, "amsgrad")
        # Newer versions of torch have this option of Adam, and set it for AdamW.
        if any(group.get("decoupled_weight_decay") for group in groups):
            return AdamWUpdate()
        return cls()

    def update(self, state: Tensor, grad: Tensor, h: Hyperparameters) -> Tensor:
        theta, mean, square = state
        grad = grad * (1 - 2 * h["maximize"])
        theta, grad = self.apply_weight_decay(theta, grad, h)
        mean = h["beta1"] * mean + (1 - h["beta1"]) * grad
        square = h["beta2"] * square + (1 - h["beta2"]) * grad.square()
        root = (square / (1 - h["beta2"] ** h["step"])).sqrt() + h["eps"]
        return torch.stack(
            [theta - h["lr"] * mean / (1 - h["beta1"] ** h["step"]) / root, mean, square]
        )

    def apply_weight_decay(
        self, theta: Tensor, grad: Tensor, h: Hyperparameters
    ) -> tuple[Tensor, Tensor]:
        """Return parameters and gradient after weight decay."""
        return theta, grad + h["weight_decay"] * theta


@register_update_rule(torch.optim.AdamW)
class AdamWUpdate(AdamUpdate):
    """`torch.optim.AdamW`: Adam with decoupled weight decay."""

    def apply_weight_decay(
        self, theta: Tensor, grad: Tensor, h: Hyperparameters
    ) -> tuple[Tensor, Tensor]:
        return theta * (1 - h["lr"] * h["weight_decay"]), grad

"""Room `secateur.optimizers`: Adam and AdamW, through theta and both moments."""

from __future__ import annotations

import torch
from torch import Tensor

from secateur.influence.optimizers.update_rule import Hyperparameters, UpdateRule


class AdamUpdate(UpdateRule):
    """`torch.optim.Adam`: bias correction, epsilon, weight decay added to the gradient, maximize."""

    hyper = ("lr", "beta1", "beta2", "eps", "weight_decay", "maximize", "step")
    slots = ("exp_avg", "exp_avg_sq")

    def update(self, state: Tensor, grad: Tensor, h: Hyperparameters) -> Tensor:
        theta, mean, square = state
        grad = grad * (1 - 2 * h["maximize"])
        theta, grad = self.decayed(theta, grad, h)
        mean = h["beta1"] * mean + (1 - h["beta1"]) * grad
        square = h["beta2"] * square + (1 - h["beta2"]) * grad.square()
        root = (square / (1 - h["beta2"] ** h["step"])).sqrt() + h["eps"]
        return torch.stack(
            [theta - h["lr"] * mean / (1 - h["beta1"] ** h["step"]) / root, mean, square]
        )

    def decayed(self, theta: Tensor, grad: Tensor, h: Hyperparameters) -> tuple[Tensor, Tensor]:
        """Parameters and gradient after weight decay."""
        return theta, grad + h["weight_decay"] * theta


class AdamWUpdate(AdamUpdate):
    """`torch.optim.AdamW`: the same with decoupled weight decay."""

    def decayed(self, theta: Tensor, grad: Tensor, h: Hyperparameters) -> tuple[Tensor, Tensor]:
        return theta * (1 - h["lr"] * h["weight_decay"]), grad

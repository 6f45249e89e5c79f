"""RAdam: theta and both moments."""

from __future__ import annotations

import torch
from torch import Tensor

from secateur.influence.optimizers.registry import register_update_rule
from secateur.influence.optimizers.update_rule import (
    Hyperparameters,
    UpdateRule,
    apply_weight_decay,
)


@register_update_rule(torch.optim.RAdam)
class RAdamUpdate(UpdateRule):
    """`torch.optim.RAdam`: plain momentum in the first steps, both weight decays, maximize."""

    hyper = (
        "lr",
        "beta1",
        "beta2",
        "eps",
        "weight_decay",
        "decoupled_weight_decay",
        "maximize",
        "step",
    )
    slots = ("exp_avg", "exp_avg_sq")

    def update(self, state: Tensor, grad: Tensor, h: Hyperparameters) -> Tensor:
        theta, grad = apply_weight_decay(state[0], grad * (1 - 2 * h["maximize"]), h)
        mean = h["beta1"] * state[1] + (1 - h["beta1"]) * grad
        square = h["beta2"] * state[2] + (1 - h["beta2"]) * grad.square()
        rectified, rectification = _rectify(h)
        # Without rectification nothing is divided by the root, whose derivative at 0 is infinite.
        root = torch.where(rectified, square, 1).sqrt() + h["eps"]
        factor = torch.where(rectified, rectification / root, 1)
        rate = h["lr"] / (1 - h["beta1"] ** h["step"])
        return torch.stack([theta - rate * mean * factor, mean, square])


def _rectify(h: Hyperparameters) -> tuple[Tensor, Tensor]:
    """Whether the second moment counts yet, and the factor of the bias-corrected step if so."""
    correction = 1 - h["beta2"] ** h["step"]
    longest = 2 / (1 - h["beta2"]) - 1
    length = longest - 2 * h["step"] * h["beta2"] ** h["step"] / correction
    ratio = (length - 4) * (length - 2) * longest
    ratio = ratio / ((longest - 4) * (longest - 2) * length)
    # The ratio may be negative before, and NaN would spread to the derivatives.
    return length > 5, torch.where(length > 5, ratio * correction, 1).sqrt()

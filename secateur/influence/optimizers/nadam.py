"""NAdam: theta and both moments."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from secateur.influence.optimizers.registry import register_update_rule
from secateur.influence.optimizers.update_rule import (
    Hyperparameters,
    UpdateRule,
    apply_weight_decay,
)


@register_update_rule(torch.optim.NAdam)
class NAdamUpdate(UpdateRule):
    """`torch.optim.NAdam`: Nesterov momentum, both weight decays, maximize.

    `mu_product` is the product of all momentum factors so far, one number for each parameter. No
    gradient changes it, so it is a setting of the step and no slot.
    """

    hyper = (
        "lr",
        "beta1",
        "beta2",
        "eps",
        "weight_decay",
        "decoupled_weight_decay",
        "momentum_decay",
        "maximize",
        "step",
        "mu_product",
    )
    slots = ("exp_avg", "exp_avg_sq")

    def settings(self, group: Mapping[str, Any], state: Mapping[str, Any]) -> list[float]:
        return super().settings({**group, "mu_product": state.get("mu_product", 1.0)}, state)

    def update(self, state: Tensor, grad: Tensor, h: Hyperparameters) -> Tensor:
        theta, grad = apply_weight_decay(state[0], grad * (1 - 2 * h["maximize"]), h)
        mean = h["beta1"] * state[1] + (1 - h["beta1"]) * grad
        square = h["beta2"] * state[2] + (1 - h["beta2"]) * grad.square()
        root = (square / (1 - h["beta2"] ** h["step"])).sqrt() + h["eps"]
        factor = _momentum_factor(h, h["step"])
        next_factor = _momentum_factor(h, h["step"] + 1)
        product = h["mu_product"] * factor
        direction = (1 - factor) / (1 - product) * grad
        direction = direction + next_factor / (1 - product * next_factor) * mean
        return torch.stack([theta - h["lr"] * direction / root, mean, square])


def _momentum_factor(h: Hyperparameters, step: Tensor) -> Tensor:
    """The factor mu of a step, which grows to beta1."""
    return h["beta1"] * (1 - 0.5 * 0.96 ** (step * h["momentum_decay"]))

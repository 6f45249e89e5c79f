"""Adam and AdamW: theta, both moments, and with amsgrad the largest second moment."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from secateur.influence.optimizers.registry import register_update_rule
from secateur.influence.optimizers.update_rule import (
    Hyperparameters,
    ParameterGroups,
    UpdateRule,
    apply_weight_decay,
)


@register_update_rule(torch.optim.Adam)
class AdamUpdate(UpdateRule):
    """`torch.optim.Adam`: bias correction, epsilon, both weight decays, amsgrad, maximize.

    Attributes:
        decoupled: whether weight decay is decoupled if a group does not say so.

    Args:
        amsgrad: whether any group divides by the largest second moment so far.
    """

    hyper = (
        "lr",
        "beta1",
        "beta2",
        "eps",
        "weight_decay",
        "decoupled_weight_decay",
        "amsgrad",
        "maximize",
        "step",
    )
    decoupled: ClassVar[bool] = False

    def __init__(self, amsgrad: bool) -> None:
        largest = ("max_exp_avg_sq",) if amsgrad else ()
        self.slots = ("exp_avg", "exp_avg_sq", *largest)

    @classmethod
    def from_groups(cls, groups: ParameterGroups) -> UpdateRule:
        amsgrad = any(group.get("amsgrad") for group in groups)
        if all(group.get("decoupled_weight_decay", cls.decoupled) for group in groups):
            return AdamWUpdate(amsgrad)
        return AdamUpdate(amsgrad)

    def settings(self, group: Mapping[str, Any], state: Mapping[str, Any]) -> list[float]:
        # Before torch 2.7 the class alone says which weight decay it is.
        return super().settings({"decoupled_weight_decay": self.decoupled, **group}, state)

    def update(self, state: Tensor, grad: Tensor, h: Hyperparameters) -> Tensor:
        theta, grad = apply_weight_decay(state[0], grad * (1 - 2 * h["maximize"]), h)
        mean = h["beta1"] * state[1] + (1 - h["beta1"]) * grad
        square = h["beta2"] * state[2] + (1 - h["beta2"]) * grad.square()
        after = [mean, square]
        if len(self.slots) == 3:
            # A group without amsgrad has no such slot, although other groups have one.
            largest = torch.where(h["amsgrad"] == 1, torch.maximum(state[3], square), state[3])
            after.append(largest)
            square = torch.where(h["amsgrad"] == 1, largest, square)
        root = (square / (1 - h["beta2"] ** h["step"])).sqrt() + h["eps"]
        rate = h["lr"] / (1 - h["beta1"] ** h["step"])
        return torch.stack([theta - rate * mean / root, *after])


@register_update_rule(torch.optim.AdamW)
class AdamWUpdate(AdamUpdate):
    """`torch.optim.AdamW`: Adam with decoupled weight decay."""

    decoupled = True

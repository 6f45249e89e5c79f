"""Lion: theta and the momentum."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from secateur.influence.optimizers.registry import register_update_rule
from secateur.influence.optimizers.update_rule import (
    Hyperparameters,
    ParameterGroups,
    UpdateRule,
    apply_weight_decay,
    refuse_option,
)

# Half the width over which the sign is differentiated, relative to the root mean square of its
# argument. Anything from 0.1 to 0.4 agrees with retraining about as well.
WIDTH = 0.2


@register_update_rule(
    "lion_pytorch.lion_pytorch.Lion",
    "lion_pytorch.foreach.Lion",
    "pytorch_optimizer.optimizer.lion.Lion",
    "timm.optim.lion.Lion",
)
class LionUpdate(UpdateRule):
    """Lion (Chen et al., 2023): both weight decays, maximize.

    It moves every parameter by the sign of an average of momentum and gradient. The derivative of a
    sign is zero, so that to first order no sample has any influence. But a removal is not
    infinitely small: it flips the signs of the averages close to zero. The sign is therefore
    differentiated by its central difference over `WIDTH` on each side. Everything else is exact.
    """

    hyper = ("lr", "beta1", "beta2", "weight_decay", "decoupled_weight_decay", "maximize")
    slots = ("exp_avg",)
    # Those of lion_pytorch and of pytorch_optimizer.
    refused_attributes = ("decoupled_wd", "maximize")

    @classmethod
    def from_groups(cls, groups: ParameterGroups) -> UpdateRule:
        # Some are timm's, the others pytorch_optimizer's.
        refused = ("caution", "corrected_weight_decay")
        for option in (*refused, "cautious", "fixed_decay", "use_gc", "adanorm"):
            refuse_option(groups, option)
        return cls()

    def settings(self, group: Mapping[str, Any], state: Mapping[str, Any]) -> list[float]:
        # Only pytorch_optimizer has the other weight decay, and only timm `maximize`.
        options = {
            "decoupled_weight_decay": group.get("weight_decouple", True),
            "maximize": group.get("maximize", False),
        }
        return super().settings({**group, **options}, state)

    def update(self, state: Tensor, grad: Tensor, h: Hyperparameters) -> Tensor:
        theta, grad = apply_weight_decay(state[0], grad * (1 - 2 * h["maximize"]), h)
        direction = _sign(h["beta1"] * state[1] + (1 - h["beta1"]) * grad)
        mean = h["beta2"] * state[1] + (1 - h["beta2"]) * grad
        return torch.stack([theta - h["lr"] * direction, mean])


def _sign(average: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """Return the signs, with the derivative `1 / width` from `-width` to `width`.

    The width is that of the last dimension's elements. Zeros, of parameters that no sample of the
    step used, do not count towards it.
    """
    fixed = average.detach()
    used = (fixed != 0).sum(-1, keepdim=True).clamp(min=1)
    width = WIDTH * (fixed.square().sum(-1, keepdim=True) / used).sqrt()
    slope = (average / torch.where(width > 0, width, torch.inf)).clamp(-1, 1)
    return fixed.sign() + slope - slope.detach()

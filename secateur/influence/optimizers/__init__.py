"""Room `secateur.optimizers`: the linearised step of each known optimizer; one small class an optimizer.

A class states the optimizer's own update, element by element, on the state `(theta, slots...)`. Its Jacobian is taken
by automatic differentiation of that update, so there is no second formula to keep right (DESIGN, section 1).
"""

from __future__ import annotations

import torch

from secateur.errors import SecateurError
from secateur.influence.optimizers.adam import AdamUpdate, AdamWUpdate
from secateur.influence.optimizers.rmsprop import RMSpropUpdate
from secateur.influence.optimizers.sgd import SGDUpdate
from secateur.influence.optimizers.update_rule import UpdateRule

__all__ = ["AdamUpdate", "AdamWUpdate", "RMSpropUpdate", "SGDUpdate", "SecateurError", "UpdateRule"]


def find_update_rule(optimizer: torch.optim.Optimizer) -> UpdateRule:
    """The linearised form of `optimizer`.

    Raises:
        SecateurError: its update is not one of those known here.
    """
    kind, groups = type(optimizer), optimizer.param_groups
    for option in ("amsgrad", "centered"):
        if any(group.get(option) for group in groups):
            raise SecateurError(
                f"{kind.__name__} with {option}=True is not known, and the recursion must follow it; leave it off"
            )
    if any(isinstance(group["lr"], torch.Tensor) and group["lr"].requires_grad for group in groups):
        raise SecateurError(
            f"{kind.__name__} with a learning rate that is itself learned is not known; give a number"
        )
    momentum = any(group.get("momentum") for group in groups)
    if kind is torch.optim.SGD:
        return SGDUpdate(momentum)
    if kind is torch.optim.RMSprop:
        return RMSpropUpdate(momentum)
    if kind in (torch.optim.Adam, torch.optim.AdamW):
        decoupled = kind is torch.optim.AdamW or any(
            group.get("decoupled_weight_decay") for group in groups
        )
        return AdamWUpdate() if decoupled else AdamUpdate()
    raise SecateurError(
        f"the optimizer {kind.__module__}.{kind.__qualname__} is not known, and the recursion must follow the real "
        f"one; use SGD, Adam, AdamW or RMSprop of torch.optim"
    )

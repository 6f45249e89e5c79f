"""The registry of update rules, by optimizer class.

To follow another optimizer, write its update as a subclass of `UpdateRule` and register it. For a
class `SignMomentum(torch.optim.Optimizer)` that keeps one tensor `average` per parameter in its
state and does `average = beta * average + (1 - beta) * grad` and
`theta = theta - lr * tanh(average)`::

    import torch

    from secateur.influence.optimizers import UpdateRule, register_update_rule

    @register_update_rule(SignMomentum)
    class SignMomentumUpdate(UpdateRule):
        hyper = ("lr", "beta")  # read from the optimizer's parameter groups at every step
        slots = ("average",)  # names in the optimizer's state, after theta

        def update(self, state, grad, h):
            theta, average = state
            average = h["beta"] * average + (1 - h["beta"]) * grad
            return torch.stack([theta - h["lr"] * average.tanh(), average])

The module that registers it must be imported before the recorder is created.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

from secateur.errors import SecateurError
from secateur.influence.optimizers.update_rule import ParameterGroups, UpdateRule

Rule = TypeVar("Rule", bound=UpdateRule)

_rules: dict[type[torch.optim.Optimizer], type[UpdateRule]] = {}


def register_update_rule(
    *optimizer_classes: type[torch.optim.Optimizer],
) -> Callable[[type[Rule]], type[Rule]]:
    """Register an update rule for optimizer classes, as a decorator of the rule's class.

    A class that is registered again gets the later rule.
    """

    def register(rule: type[Rule]) -> type[Rule]:
        for optimizer_class in optimizer_classes:
            _rules[optimizer_class] = rule
        return rule

    return register


def find_update_rule(optimizer: torch.optim.Optimizer) -> UpdateRule:
    """Return the update rule of an optimizer.

    Raises:
        SecateurError: as `choose_update_rule` does.
    """
    return choose_update_rule(type(optimizer), optimizer.param_groups)


def choose_update_rule(kind: type[torch.optim.Optimizer], groups: ParameterGroups) -> UpdateRule:
    """Return the update rule of an optimizer class with the options of some parameter groups.

    Raises:
        SecateurError: the class is not registered, or the groups have an option that its rule does
            not follow, or a learning rate is a tensor that is learned.
    """
    # Only the exact class counts: a subclass usually changes the update.
    rule = _rules.get(kind)
    if rule is None:
        registered = ", ".join(sorted(_full_name(known) for known in _rules))
        raise SecateurError(
            f"the optimizer {_full_name(kind)} is not known, and the recursion must follow the "
            f"real update; use a registered one ({registered}), or write its update as an "
            f"UpdateRule and register that with "
            f"secateur.influence.optimizers.register_update_rule"
        )
    rates = [group.get("lr") for group in groups]
    if any(isinstance(rate, torch.Tensor) and rate.requires_grad for rate in rates):
        raise SecateurError(
            f"{kind.__name__} with a learning rate that is itself learned is not known; give a "
            f"number"
        )
    return rule.from_groups(groups)


def _full_name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"

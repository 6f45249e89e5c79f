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

The module that registers it must be imported before the recorder is created. An optimizer that
only passes the step on to another (Accelerate's, Lightning's) is followed as the one that it holds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch

from secateur.errors import SecateurError
from secateur.influence.optimizers.update_rule import (
    ParameterGroups,
    UpdateRule,
    refuse_option,
)

Rule = TypeVar("Rule", bound=UpdateRule)

_rules: dict[type[torch.optim.Optimizer] | str, type[UpdateRule]] = {}
_refusals: dict[str, str] = {}

# Classes that pass `step` on to the optimizer in their attribute `optimizer`, unchanged. A subclass
# of Accelerate's does not count: DeepSpeed's trains other tensors than the model's. Lightning makes
# a subclass for every optimizer that it wraps.
_WRAPPERS = ("accelerate.optimizer.AcceleratedOptimizer",)
_WRAPPER_BASES = (
    "lightning.pytorch.core.optimizer.LightningOptimizer",
    "pytorch_lightning.core.optimizer.LightningOptimizer",
)


def register_update_rule(
    *optimizer_classes: type[torch.optim.Optimizer] | str,
) -> Callable[[type[Rule]], type[Rule]]:
    """Register an update rule for optimizer classes, as a decorator of the rule's class.

    A class that is registered again gets the later rule.

    Args:
        optimizer_classes: optimizer classes, or their full names `module.Class`, to follow those of
            a package that need not be installed.
    """

    def register(rule: type[Rule]) -> type[Rule]:
        for optimizer_class in optimizer_classes:
            _rules[optimizer_class] = rule
        return rule

    return register


def register_refusal(reason: str, *names: str) -> None:
    """Say why some optimizers cannot be followed, and what to use in their place.

    Args:
        reason: ends a sentence that begins with the optimizer's name.
        names: full names `module.Class`, or of a module, for all of its optimizers.
    """
    _refusals.update(dict.fromkeys(names, reason))


def unwrap_optimizer(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Return the optimizer that a known wrapper holds; any other optimizer itself."""
    while _is_wrapper(type(optimizer)):
        optimizer = optimizer.optimizer  # type: ignore[attr-defined]
    return optimizer


def find_update_rule(optimizer: torch.optim.Optimizer) -> UpdateRule:
    """Return the update rule of an optimizer, or of the one that it wraps.

    Raises:
        SecateurError: as `choose_update_rule` does.
    """
    optimizer = unwrap_optimizer(optimizer)
    rule = choose_update_rule(type(optimizer), optimizer.param_groups)
    for option in rule.refused_attributes:
        refuse_option([vars(optimizer)], option)
    return rule


def choose_update_rule(kind: type[torch.optim.Optimizer], groups: ParameterGroups) -> UpdateRule:
    """Return the update rule of an optimizer class with the options of some parameter groups.

    Raises:
        SecateurError: the class is not registered, or the groups have an option that its rule does
            not follow, or a setting is a tensor that is learned.
    """
    # Only the exact class counts: a subclass usually changes the update.
    rule = _rules.get(kind) or _rules.get(_full_name(kind))
    if rule is None:
        raise SecateurError(_refuse(_full_name(kind)))
    for group in groups:
        _check_settings(kind, group)
    return rule.from_groups(groups)


def _is_wrapper(kind: type) -> bool:
    bases = (_full_name(base) for base in kind.__bases__)
    return _full_name(kind) in _WRAPPERS or any(name in _WRAPPER_BASES for name in bases)


def _check_settings(kind: type, group: Mapping[str, Any]) -> None:
    """Refuse settings with which training itself is differentiated."""
    values = {"learning rate": group.get("lr"), "weight decay": group.get("weight_decay")}
    values |= {f"beta{i}": beta for i, beta in enumerate(group.get("betas", ()), 1)}
    for name, value in values.items():
        if isinstance(value, torch.Tensor) and value.requires_grad:
            raise SecateurError(
                f"{kind.__name__} with a {name} that is itself learned is not known; give a number"
            )
    refuse_option([group], "differentiable")


def _refuse(name: str) -> str:
    """The sentence that refuses an optimizer."""
    for refused, reason in _refusals.items():
        if f"{name}.".startswith(f"{refused}."):
            return f"the optimizer {name} {reason}"
    registered = ", ".join(sorted(k if isinstance(k, str) else _full_name(k) for k in _rules))
    return (
        f"the optimizer {name} is not known, and the recursion must follow the real update; use a "
        f"registered one ({registered}), or write its update as an UpdateRule and register that "
        f"with secateur.influence.optimizers.register_update_rule"
    )


def _full_name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"

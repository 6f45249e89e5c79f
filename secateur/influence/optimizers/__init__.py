"""Update rules: the differentiable form of each known optimizer's step, one small class each.

A rule states the optimizer's own update, element by element, on the state `(theta, slots...)`. Its
Jacobian comes from automatic differentiation of that update, so there is no second formula that
could disagree with the first. `registry` shows how to add a rule for another optimizer.
"""

from __future__ import annotations

import importlib
import pkgutil

from secateur.influence.optimizers.registry import (
    choose_update_rule,
    find_update_rule,
    register_refusal,
    register_update_rule,
    unwrap_optimizer,
)
from secateur.influence.optimizers.update_rule import (
    Hyperparameters,
    ParameterGroups,
    UpdateRule,
    fetch_numbers,
    refuse_option,
)

__all__ = [
    "Hyperparameters",
    "ParameterGroups",
    "UpdateRule",
    "choose_update_rule",
    "fetch_numbers",
    "find_update_rule",
    "refuse_option",
    "register_refusal",
    "register_update_rule",
    "unwrap_optimizer",
]

# Importing a module registers its rules, so a new module needs no line here.
for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

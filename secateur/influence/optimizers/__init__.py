"""Update rules: the differentiable form of each known optimizer's step, one small class each.

A rule states the optimizer's own update, element by element, on the state `(theta, slots...)`. Its
Jacobian comes from automatic differentiation of that update, so there is no second formula that
could disagree with the first. `registry` shows how to add a rule for another optimizer.
"""

from secateur.influence.optimizers import adam, registry, rmsprop, sgd
from secateur.influence.optimizers.adam import AdamUpdate, AdamWUpdate
from secateur.influence.optimizers.registry import find_update_rule, register_update_rule
from secateur.influence.optimizers.rmsprop import RMSpropUpdate
from secateur.influence.optimizers.sgd import SGDUpdate
from secateur.influence.optimizers.update_rule import Hyperparameters, UpdateRule, refuse_option

__all__ = [
    "AdamUpdate",
    "AdamWUpdate",
    "Hyperparameters",
    "RMSpropUpdate",
    "SGDUpdate",
    "UpdateRule",
    "adam",
    "find_update_rule",
    "refuse_option",
    "register_update_rule",
    "registry",
    "rmsprop",
    "sgd",
]

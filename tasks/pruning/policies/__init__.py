"""The policies that a plan can name. To add one, add a module and import it here."""

from __future__ import annotations

from secateur.tasks.pruning.policies.balanced import BalancedPolicy
from secateur.tasks.pruning.policies.baselines import (
    EL2NPolicy,
    GraNdPolicy,
    LossPolicy,
    TracInPolicy,
)
from secateur.tasks.pruning.policies.by_score import (
    DropHarmfulPolicy,
    ThresholdPolicy,
    TopPolicy,
)
from secateur.tasks.pruning.policies.random_control import RandomPolicy

__all__ = [
    "BalancedPolicy",
    "DropHarmfulPolicy",
    "EL2NPolicy",
    "GraNdPolicy",
    "LossPolicy",
    "RandomPolicy",
    "ThresholdPolicy",
    "TopPolicy",
    "TracInPolicy",
]

"""Room `tasks`: the plan's optimizer, as torch's own, and linearised."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from secateur.errors import PlanError
from secateur.influence.optimizers import UpdateRule, find_update_rule
from secateur.tasks.plan import OptimizerConfig, ParameterGroupConfig

KINDS: dict[str, type[torch.optim.Optimizer]] = {
    "sgd": torch.optim.SGD,
    "adamw": torch.optim.AdamW,
    "adam": torch.optim.Adam,
    "rmsprop": torch.optim.RMSprop,
}


def build_optimizer(spec: OptimizerConfig, model: nn.Module) -> torch.optim.Optimizer:
    """The plan's optimizer over the model's trainable parameters; each group's `initial_lr` is its unscheduled rate.

    Raises:
        PlanError: a group's pattern matches no parameter.
    """
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for pattern in (pattern for group in spec.groups for pattern in group.parameters):
        if not any(fnmatchcase(name, pattern) for name in named):
            raise PlanError(
                f"pattern {pattern} of optimizer.groups matches no parameter; known are {', '.join(named)}"
            )
    members: dict[int, list[nn.Parameter]] = {}
    for name, parameter in named.items():
        members.setdefault(_group_of(name, spec.groups), []).append(parameter)
    return _optimizer(
        spec,
        [_options(spec, number) | {"params": held} for number, held in sorted(members.items())],
    )


def plan_update_rule(spec: OptimizerConfig) -> UpdateRule:
    """The linearised form of the plan's optimizer."""
    return find_update_rule(_optimizer(spec, [{"params": [nn.Parameter(torch.zeros(1))]}]))


def _group_of(name: str, groups: list[ParameterGroupConfig]) -> int:
    """Number of the first group that holds a name; one more than the last where none does."""
    matching = (
        n
        for n, g in enumerate(groups)
        if any(fnmatchcase(name, pattern) for pattern in g.parameters)
    )
    return next(matching, len(groups))


def _options(spec: OptimizerConfig, number: int) -> dict[str, Any]:
    own = (
        spec.groups[number].model_dump(exclude={"parameters"}, exclude_none=True)
        if number < len(spec.groups)
        else {}
    )
    return {"lr": spec.lr, "initial_lr": own.get("lr", spec.lr), **own}


def _optimizer(spec: OptimizerConfig, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    settings = spec.model_dump(exclude={"kind", "groups", "clip_norm", "at_stage"})
    return KINDS[spec.kind](groups, **settings)

"""The optimizers that a plan can name: the settings of each, and building one over a model."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat, model_validator
from torch import nn

from secateur.errors import PlanError
from secateur.influence.optimizers import UpdateRule, choose_update_rule
from secateur.tasks.plan import (
    OptimizerConfig,
    ParameterGroupConfig,
    Share,
    register_optimizer,
)

AMSGRAD = "divide by the largest second moment so far"
DECOUPLED = "take weight decay off the parameters, not through the gradient"


@register_optimizer
class SGDConfig(OptimizerConfig):
    """Stochastic gradient descent."""

    kind: Literal["sgd"] = "sgd"
    momentum: Share = 0.0
    nesterov: bool = False
    optimizer_class = torch.optim.SGD
    linear = True

    @model_validator(mode="after")
    def _check_nesterov(self) -> SGDConfig:
        if self.nesterov and self.momentum == 0:
            raise ValueError("`nesterov` needs a `momentum` above 0")
        return self


class AdaptiveConfig(OptimizerConfig):
    """The settings that Adam and its relatives share."""

    betas: tuple[Share, Share] = (0.9, 0.999)
    eps: PositiveFloat = 1e-8


@register_optimizer
class AdamWConfig(AdaptiveConfig):
    """Adam with decoupled weight decay."""

    kind: Literal["adamw"] = "adamw"
    amsgrad: bool = Field(False, description=AMSGRAD)
    optimizer_class = torch.optim.AdamW


@register_optimizer
class AdamConfig(AdaptiveConfig):
    """Adam; weight decay is added to the gradient."""

    kind: Literal["adam"] = "adam"
    amsgrad: bool = Field(False, description=AMSGRAD)
    optimizer_class = torch.optim.Adam


@register_optimizer
class NAdamConfig(AdaptiveConfig):
    """Adam with Nesterov momentum."""

    kind: Literal["nadam"] = "nadam"
    momentum_decay: NonNegativeFloat = Field(0.004, description="how slowly the momentum warms up")
    decoupled_weight_decay: bool = Field(False, description=DECOUPLED)
    optimizer_class = torch.optim.NAdam


@register_optimizer
class RAdamConfig(AdaptiveConfig):
    """Adam with a rectified learning rate in the first steps."""

    kind: Literal["radam"] = "radam"
    decoupled_weight_decay: bool = Field(False, description=DECOUPLED)
    optimizer_class = torch.optim.RAdam


@register_optimizer
class AdagradConfig(OptimizerConfig):
    """Adagrad."""

    kind: Literal["adagrad"] = "adagrad"
    lr_decay: NonNegativeFloat = Field(
        0.0, description="step t (from 0) has rate lr / (1 + t lr_decay)"
    )
    initial_accumulator_value: NonNegativeFloat = Field(
        0.0, description="the sum of squared gradients before the first step"
    )
    eps: PositiveFloat = 1e-10
    optimizer_class = torch.optim.Adagrad


@register_optimizer
class RMSpropConfig(OptimizerConfig):
    """RMSProp."""

    kind: Literal["rmsprop"] = "rmsprop"
    alpha: Share = 0.99
    eps: PositiveFloat = 1e-8
    momentum: Share = 0.0
    centered: bool = Field(False, description="divide by the gradient's estimated variance")
    optimizer_class = torch.optim.RMSprop


def build_optimizer(config: OptimizerConfig, model: nn.Module) -> torch.optim.Optimizer:
    """Return the plan's optimizer over a model's trainable parameters.

    Each group's `initial_lr` is its learning rate before the schedule.

    Raises:
        PlanError: a group's pattern matches no parameter.
    """
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for pattern in (pattern for group in config.groups for pattern in group.parameters):
        if not any(fnmatchcase(name, pattern) for name in named):
            raise PlanError(
                f"pattern {pattern} of optimizer.groups matches no parameter; the parameters are "
                f"{', '.join(named)}"
            )
    members: dict[int, list[nn.Parameter]] = {}
    for name, parameter in named.items():
        members.setdefault(_group_number(name, config.groups), []).append(parameter)
    groups = [
        _group_settings(config, number) | {"params": parameters}
        for number, parameters in sorted(members.items())
    ]
    return config.build(groups)


def plan_update_rule(config: OptimizerConfig) -> UpdateRule:
    """Return the update rule of the plan's optimizer."""
    # No optimizer is built, because the first one imports torch's compiler, which takes a second.
    return choose_update_rule(config.optimizer_class, [config.options()])


def _group_number(name: str, groups: list[ParameterGroupConfig]) -> int:
    """The first group that lists a parameter; one more than the last if none does."""
    for number, group in enumerate(groups):
        if any(fnmatchcase(name, pattern) for pattern in group.parameters):
            return number
    return len(groups)


def _group_settings(config: OptimizerConfig, number: int) -> dict[str, Any]:
    own: dict[str, Any] = {}
    if number < len(config.groups):
        own = config.groups[number].model_dump(exclude={"parameters"}, exclude_none=True)
    return {"lr": config.lr, "initial_lr": own.get("lr", config.lr), **own}

"""The base class of optimizer settings, their registry, and the learning rate schedule."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, PositiveFloat

from secateur.tasks.plan.base import Config
from secateur.tasks.plan.registry import Registry

if TYPE_CHECKING:
    import torch


class ParameterGroupConfig(Config):
    """Parameters with their own settings."""

    parameters: list[str] = Field(min_length=1, description="name patterns: `*.bias`")
    lr: PositiveFloat | None = Field(None, description="the optimizer's if null")
    weight_decay: Annotated[float, Field(ge=0)] | None = Field(
        None, description="the optimizer's if null"
    )


class OptimizerConfig(Config):
    """The settings that all optimizers share. One optimizer serves every stage.

    A subclass gives `kind` its name, names the class in `optimizer_class`, and adds that class's
    own arguments as fields. The update itself is registered with
    `secateur.influence.optimizers.register_update_rule`.

    Attributes:
        optimizer_class: the torch optimizer that these are the settings of.
        linear: whether its update is linear in state and gradient, so that a kronecker basis can
            follow it.
    """

    kind: str
    lr: PositiveFloat
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    groups: list[ParameterGroupConfig] = Field(
        default_factory=list, description="the first group that matches a parameter's name counts"
    )
    clip_norm: PositiveFloat | None = Field(None, description="largest norm of a step's gradient")
    at_stage: Literal["reset", "carry"] = Field(
        "reset", description="the optimizer's state at a stage boundary"
    )
    optimizer_class: ClassVar[type[torch.optim.Optimizer]]
    linear: ClassVar[bool] = False

    def build(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """Return the torch optimizer over some parameter groups."""
        return self.optimizer_class(groups, **self.options())

    def options(self) -> dict[str, Any]:
        """Return the arguments of the torch optimizer's class."""
        return self.model_dump(exclude={"kind", "groups", "clip_norm", "at_stage"})


OPTIMIZERS: Registry[OptimizerConfig] = Registry(
    OptimizerConfig, tag="kind", builtins="secateur.tasks.training.optimizers"
)
register_optimizer = OPTIMIZERS.register


class ScheduleConfig(Config):
    """Learning rate over the steps: a linear warm-up, then constant or a cosine to `final`."""

    kind: Literal["constant", "cosine"] = "constant"
    warmup: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0, description="share of the steps spent warming up"
    )
    final: Annotated[float, Field(ge=0, le=1)] = Field(
        0.1, description="last rate of a cosine, as a share of `lr`"
    )
    over: Literal["stage", "run"] = Field(
        "stage", description="what it spans; `run` needs `steps` in every stage"
    )

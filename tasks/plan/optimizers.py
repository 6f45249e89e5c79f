"""Room `tasks.plan`: the optimizer and its schedule."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat

from secateur.tasks.plan.base import Config, Share


class ParameterGroupConfig(Config):
    """Parameters with settings of their own."""

    parameters: list[str] = Field(min_length=1, description="name patterns: `*.bias`")
    lr: PositiveFloat | None = Field(None, description="the optimizer's if null")
    weight_decay: Annotated[float, Field(ge=0)] | None = Field(
        None, description="the optimizer's if null"
    )


class OptimizerBase(Config):
    """What all optimizers have; one serves every stage."""

    lr: PositiveFloat
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    groups: list[ParameterGroupConfig] = Field(
        default_factory=list, description="the first that matches a name holds"
    )
    clip_norm: PositiveFloat | None = Field(None, description="largest norm of a step's gradient")
    at_stage: Literal["reset", "carry"] = Field(
        "reset", description="the optimizer's state at a stage boundary"
    )


class SGDConfig(OptimizerBase):
    """Stochastic gradient descent."""

    kind: Literal["sgd"] = "sgd"
    momentum: Share = 0.0
    nesterov: bool = False


class AdamWConfig(OptimizerBase):
    """Adam with decoupled weight decay."""

    kind: Literal["adamw"] = "adamw"
    betas: tuple[Share, Share] = (0.9, 0.999)
    eps: PositiveFloat = 1e-8


class AdamConfig(OptimizerBase):
    """Adam; weight decay is part of the gradient."""

    kind: Literal["adam"] = "adam"
    betas: tuple[Share, Share] = (0.9, 0.999)
    eps: PositiveFloat = 1e-8


class RMSpropConfig(OptimizerBase):
    """RMSProp."""

    kind: Literal["rmsprop"] = "rmsprop"
    alpha: Share = 0.99
    eps: PositiveFloat = 1e-8
    momentum: Share = 0.0


OptimizerConfig = Annotated[
    SGDConfig | AdamWConfig | AdamConfig | RMSpropConfig, Field(discriminator="kind")
]


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

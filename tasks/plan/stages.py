"""Room `tasks.plan`: stages, their windows, and the policies that prune after them."""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

from pydantic import Discriminator, Field, NonNegativeInt, PositiveInt, Tag, model_validator

from secateur.tasks.plan.base import Config, Fraction

PREVIOUS = "previous"
GIVEN = "given"  # tells a list of windows from automatic ones; no part of what a user writes


class SelectionConfig(Config):
    """Online selection: each step of a window trains on the best of more candidates than its batch holds."""

    method: Literal["grad_align", "greats", "random"] = Field(
        "greats",
        description="`grad_align`: alignment with the target's gradient; `greats`: greedily, less what picks share",
    )
    candidates: Annotated[int, Field(ge=2)] = Field(
        3, description="candidates a step, as a multiple of `batch_size`"
    )
    target: str | None = Field(
        None, description="the target whose loss is to fall; the one pruned for if null"
    )
    samples: PositiveInt = Field(
        64, description="of the target's samples, others at every step, that judge candidates"
    )


class WindowConfig(Config):
    """A stretch of a stage in which samples are recorded and judged."""

    start: Annotated[float, Field(ge=0)] = Field(
        0.0, description="fraction of the stage's steps, or a step"
    )
    stop: Annotated[float, Field(gt=0)] = Field(
        1.0, description="fraction of the stage's steps, or a step"
    )
    unit: Literal["fraction", "steps"] = "fraction"
    select: SelectionConfig | None = Field(
        None, description="online selection; without it steps train on what the order gives"
    )

    @model_validator(mode="after")
    def _ordered(self) -> WindowConfig:
        if self.stop <= self.start:
            raise ValueError(f"the window {self.start} to {self.stop} is empty")
        if self.unit == "fraction" and self.stop > 1:
            raise ValueError(
                f"the window {self.start} to {self.stop} lies outside its stage (0 to 1)"
            )
        return self


class AutoWindowsConfig(Config):
    """Windows taken from the influence profile of a stage that was recorded whole."""

    auto: str = Field(
        min_length=1,
        description="`previous`: the nearest stage before this one that is recorded whole; or the path or URL of an "
        "earlier run",
    )
    stage: NonNegativeInt | None = Field(
        None, description="the earlier run's stage; the one of the same number if null"
    )
    budget: Fraction = Field(
        0.4, description="share of the stage's steps that its windows may hold at most"
    )
    select: SelectionConfig | None = Field(None, description="online selection in these windows")

    @model_validator(mode="after")
    def _named(self) -> AutoWindowsConfig:
        if self.auto == PREVIOUS and self.stage is not None:
            raise ValueError(
                "`stage` names a stage of an earlier run; leave it out beside `auto: previous`"
            )
        return self


def _kind_of_windows(value: Any) -> str:
    return "auto" if isinstance(value, dict | AutoWindowsConfig) else GIVEN


class TopPolicy(Config):
    """Keeps the best-scored fraction."""

    policy: Literal["top"] = "top"
    keep: Fraction


class ThresholdPolicy(Config):
    """Keeps samples that score at least so much."""

    policy: Literal["threshold"] = "threshold"
    at_least: float


class DropHarmfulPolicy(Config):
    """Drops samples with a negative score."""

    policy: Literal["drop_harmful"] = "drop_harmful"


class BalancedPolicy(Config):
    """Keeps the best-scored fraction of every label or domain."""

    policy: Literal["balanced"] = "balanced"
    keep: Fraction
    by: str = Field(
        description="a member of the sample (`cls`), or a field of a JSON member (`json:domain`)"
    )


class RandomPolicy(Config):
    """Control: keeps a random fraction."""

    policy: Literal["random"] = "random"
    keep: Fraction


class BaselinePolicy(Config):
    """Keeps a fraction by a measure of each sample's last use that knows no target."""

    policy: str
    keep: Fraction
    prefer: Literal["lowest", "highest"] = Field(
        "lowest",
        description="the end that is kept: `lowest` leaves out what fits badly (wrong labels), `highest` what is easy",
    )


class LossPolicy(BaselinePolicy):
    """By the loss before the step."""

    policy: Literal["loss"] = "loss"


class GraNdPolicy(BaselinePolicy):
    """GraNd (Paul et al., 2021): by the norm of the loss's gradient, in the numbers of the basis."""

    policy: Literal["grand"] = "grand"


class EL2NPolicy(BaselinePolicy):
    """EL2N (Paul et al., 2021): by the norm of the loss's gradient with respect to the logits, softmax minus one-hot."""

    policy: Literal["el2n"] = "el2n"


class TracInPolicy(Config):
    """Keeps the fraction of highest TracIn (Pruthi et al., 2020): the sum over a sample's uses of learning rate times
    the product of its contribution with the target's mean gradient at the nearest segment checkpoint."""

    policy: Literal["tracin"] = "tracin"
    keep: Fraction


Policy = Annotated[
    TopPolicy
    | ThresholdPolicy
    | DropHarmfulPolicy
    | BalancedPolicy
    | RandomPolicy
    | LossPolicy
    | GraNdPolicy
    | EL2NPolicy
    | TracInPolicy,
    Field(discriminator="policy"),
]
POLICY_NAMES = [kind.model_fields["policy"].default for kind in get_args(get_args(Policy)[0])]


class StageConfig(Config):
    """A stretch of training on one set of shards, and how they are pruned for the next one."""

    epochs: PositiveInt | None = None
    steps: PositiveInt | None = None
    batch_size: PositiveInt
    accumulate: PositiveInt = Field(
        1, description="micro-batches a step; `batch_size` is their sum"
    )
    windows: Annotated[
        Annotated[list[WindowConfig], Field(min_length=1), Tag(GIVEN)]
        | Annotated[AutoWindowsConfig, Tag("auto")],
        Discriminator(_kind_of_windows),
    ] = Field(
        default_factory=lambda: [WindowConfig()], description="a list, or where to take them from"
    )
    stride: PositiveInt = Field(
        1, description="outside windows, record every n-th step for the curvature"
    )
    prune: Policy | None = None

    @model_validator(mode="after")
    def _one_length(self) -> StageConfig:
        if (self.epochs is None) == (self.steps is None):
            raise ValueError("a stage has either `epochs` or `steps`")
        if self.batch_size % self.accumulate:
            raise ValueError(
                f"batch_size {self.batch_size} is no multiple of accumulate {self.accumulate}"
            )
        return self

    @property
    def given(self) -> list[WindowConfig]:
        """The windows as the plan gives them; none where they are taken from elsewhere."""
        return self.windows if isinstance(self.windows, list) else []

    @property
    def selections(self) -> list[SelectionConfig]:
        """The online selections of its windows."""
        specs: list[WindowConfig | AutoWindowsConfig] = (
            [self.windows] if isinstance(self.windows, AutoWindowsConfig) else [*self.windows]
        )
        return [spec.select for spec in specs if spec.select]

    @property
    def is_recorded_whole(self) -> bool:
        """Whether the windows, as the plan gives them, leave no step out."""
        reach = 0.0
        for window in sorted(
            self.given, key=lambda w: w.start / (1 if w.unit == "fraction" else self.steps or 1)
        ):
            unit = 1 if window.unit == "fraction" else self.steps
            if unit is None or window.start / unit > reach:
                return False
            reach = max(reach, window.stop / unit)
        return reach >= 1

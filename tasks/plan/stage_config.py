"""Settings of a stage: its length, its windows, online selection, and how it is pruned."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, NonNegativeInt, PositiveInt, Tag, model_validator

from secateur.tasks.plan.base import Config, Fraction
from secateur.tasks.plan.policy_config import POLICIES, Policy

PREVIOUS = "previous"  # the value of `auto` that means an earlier stage of the same run
LISTED = "listed"  # the tag of a list of windows; pydantic needs one, users never write it


class SelectionConfig(Config):
    """Online selection: each step of a window trains on the best of a larger set of candidates."""

    method: Literal["grad_align", "greats", "random"] = Field(
        "greats",
        description="`grad_align`: alignment with the target's gradient; `greats`: greedy, where "
        "each pick lowers the gain of similar candidates; `random`: a control",
    )
    candidates: Annotated[int, Field(ge=2)] = Field(
        3, description="candidates per step, as a multiple of `batch_size`"
    )
    target: str | None = Field(
        None, description="the target whose loss should fall; the one pruned for if null"
    )
    samples: PositiveInt = Field(
        64, description="target samples that score the candidates of a step; each step uses others"
    )


class WindowConfig(Config):
    """A part of a stage in which samples are recorded and scored."""

    start: Annotated[float, Field(ge=0)] = Field(
        0.0, description="the first step, as a fraction of the stage's steps or as a number"
    )
    stop: Annotated[float, Field(gt=0)] = Field(
        1.0, description="the step after the last one, given in the same way"
    )
    unit: Literal["fraction", "steps"] = "fraction"
    select: SelectionConfig | None = Field(
        None, description="online selection; without it, steps train on the batches of the schedule"
    )

    @model_validator(mode="after")
    def _check_order(self) -> WindowConfig:
        if self.stop <= self.start:
            raise ValueError(f"the window {self.start} to {self.stop} is empty")
        if self.unit == "fraction" and self.stop > 1:
            raise ValueError(
                f"the window {self.start} to {self.stop} lies outside its stage (0 to 1)"
            )
        return self


class AutoWindowsConfig(Config):
    """Windows taken from the influence profile of a stage that was recorded in full."""

    auto: str = Field(
        min_length=1,
        description="`previous`: the nearest earlier stage that is recorded in full; or the path "
        "or URL of an earlier run",
    )
    stage: NonNegativeInt | None = Field(
        None, description="the earlier run's stage; the stage of the same number if null"
    )
    budget: Fraction = Field(0.4, description="largest share of the stage's steps in its windows")
    select: SelectionConfig | None = Field(None, description="online selection in these windows")

    @model_validator(mode="after")
    def _check_stage(self) -> AutoWindowsConfig:
        if self.auto == PREVIOUS and self.stage is not None:
            raise ValueError(
                "`stage` names a stage of an earlier run; leave it out if `auto` is `previous`"
            )
        return self


def _windows_tag(value: Any) -> str:
    return "auto" if isinstance(value, dict | AutoWindowsConfig) else LISTED


class StageConfig(Config):
    """Training on one set of shards, and how these are pruned for the next stage."""

    epochs: PositiveInt | None = None
    steps: PositiveInt | None = None
    batch_size: PositiveInt
    accumulate: PositiveInt = Field(
        1, description="micro-batches per step; together they have `batch_size` samples"
    )
    windows: Annotated[
        Annotated[list[WindowConfig], Field(min_length=1), Tag(LISTED)]
        | Annotated[AutoWindowsConfig, Tag("auto")],
        Discriminator(_windows_tag),
    ] = Field(
        default_factory=lambda: [WindowConfig()],
        description="a list of windows, or `auto` and the stage to take them from",
    )
    stride: PositiveInt = Field(
        1, description="outside windows, record every n-th step, for the curvature only"
    )
    prune: Annotated[Policy, POLICIES] | None = None

    @model_validator(mode="after")
    def _check_length(self) -> StageConfig:
        if (self.epochs is None) == (self.steps is None):
            raise ValueError("a stage has either `epochs` or `steps`")
        if self.batch_size % self.accumulate:
            raise ValueError(
                f"batch_size {self.batch_size} is not a multiple of accumulate {self.accumulate}"
            )
        return self

    @property
    def listed_windows(self) -> list[WindowConfig]:
        """The windows that the plan lists; none if they are automatic."""
        return self.windows if isinstance(self.windows, list) else []

    @property
    def auto_windows(self) -> AutoWindowsConfig | None:
        """Where automatic windows are taken from; None if the plan lists the windows."""
        return self.windows if isinstance(self.windows, AutoWindowsConfig) else None

    @property
    def selections(self) -> list[SelectionConfig]:
        """The online selections of all windows."""
        windows = [self.auto_windows] if self.auto_windows else self.listed_windows
        return [window.select for window in windows if window.select]

    @property
    def is_recorded_in_full(self) -> bool:
        """Whether the listed windows cover every step."""

        def scaled(value: float, window: WindowConfig) -> float:
            return value if window.unit == "fraction" else value / (self.steps or 1)

        covered = 0.0
        for window in sorted(self.listed_windows, key=lambda w: scaled(w.start, w)):
            # With epochs the number of steps is not known here, so steps cannot be compared.
            if window.unit == "steps" and self.steps is None:
                return False
            if scaled(window.start, window) > covered:
                return False
            covered = max(covered, scaled(window.stop, window))
        return covered >= 1

"""Room `tasks.plan`: what the parts of a plan have in common."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from secateur.storage.urls import check_url

Fraction = Annotated[float, Field(gt=0, le=1)]
Share = Annotated[float, Field(ge=0, lt=1)]


class Config(BaseModel):
    """A part of the plan: unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)


class FactoryConfig(Config):
    """A Python object made from an import path and arguments."""

    factory: str = Field(pattern=r"^[\w.]+:\w+$", description="import path, `package.module:name`")
    args: dict[str, Any] = Field(
        default_factory=dict, description="keyword arguments it is called with"
    )


class TaskConfig(FactoryConfig):
    """How a sample becomes tensors and a loss: an object with `collate(samples)` and `losses(model, batch)`."""

    reduction: Literal["mean", "sum", "token_mean"] = Field(
        "mean",
        description="how a batch's losses become one; `token_mean` weighs samples by the task's `sizes(batch)`",
    )


class DataConfig(Config):
    """WebDataset shards, local or on S3."""

    shards: str | list[str] = Field(
        description="paths or URLs, with brace notation: `train-{000000..000003}.tar`"
    )
    damaged: Literal["fail", "skip"] = Field(
        "fail",
        description="what to do with a shard that is no whole tar: stop, or leave it out and report it",
    )

    @field_validator("shards")
    @classmethod
    def _without_credentials(cls, shards: str | list[str]) -> str | list[str]:
        for url in [shards] if isinstance(shards, str) else shards:
            without_credentials(url)
        return shards


class TargetConfig(DataConfig):
    """A validation set."""

    judging: Share | None = Field(
        None,
        description="share of its samples, drawn once, that never score but judge: trials, comparisons and the figures that "
        "stages report are theirs; null for half of the target pruned for where `trust.trial` needs it, else none",
    )


def without_credentials(url: str) -> str:
    """A URL that may stand in a plan, which is written into the run as it is.

    Raises:
        ValueError: it holds credentials.
    """
    check_url(url)
    return url

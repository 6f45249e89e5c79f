"""Settings for what a run is made from: model, learning task, training data and targets."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator

from secateur.storage.urls import check_url
from secateur.tasks.plan.base import Config, Share


class FactoryConfig(Config):
    """A Python object, made by calling an import path with arguments."""

    factory: str = Field(pattern=r"^[\w.]+:\w+$", description="import path, `package.module:name`")
    args: dict[str, Any] = Field(default_factory=dict, description="keyword arguments of that call")


class TaskConfig(FactoryConfig):
    """The learning task: an object with `collate(samples)` and `losses(model, batch)`."""

    reduction: Literal["mean", "sum", "token_mean"] = Field(
        "mean",
        description="how the losses of a batch become one loss; `token_mean` weighs each sample "
        "by the task's `sizes(batch)`",
    )


class DataConfig(Config):
    """WebDataset shards, local or on S3."""

    shards: str | list[str] = Field(
        description="paths or URLs, with brace notation: `train-{000000..000003}.tar`"
    )
    damaged: Literal["fail", "skip"] = Field(
        "fail",
        description="what to do with a shard that is not a complete tar: stop, or skip the whole "
        "shard and report it",
    )

    @field_validator("shards")
    @classmethod
    def _refuse_credentials(cls, shards: str | list[str]) -> str | list[str]:
        for url in [shards] if isinstance(shards, str) else shards:
            check_url(url)
        return shards


class TargetConfig(DataConfig):
    """A validation set that training samples are scored against."""

    judging: Share | None = Field(
        None,
        description="share of its samples that are held out: they never score training samples, "
        "and trials, comparisons and the metrics of reports use only them. Null means half for "
        "the target pruned for if `trust.trial` needs it, else none",
    )

"""Settings of the processes that train a stage together."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveInt, model_validator

from secateur.tasks.plan.base import Config


class LaunchConfig(Config):
    """How many processes of this machine train a stage together. `torchrun` starts them."""

    processes: PositiveInt = Field(
        1, description="each takes an equal part of every batch; on `cuda`, each has its own GPU"
    )
    shard: Literal["none", "fsdp"] = Field(
        "none",
        description="`none`: every process has the whole model (DDP); `fsdp`: parameters, "
        "gradients and optimizer state are divided among them (FSDP2)",
    )

    @model_validator(mode="after")
    def _check_shard(self) -> LaunchConfig:
        if self.shard == "fsdp" and self.processes == 1:
            raise ValueError(
                "`shard: fsdp` divides a model among several processes; set `processes` to 2 or "
                "more, or leave `shard` out"
            )
        return self

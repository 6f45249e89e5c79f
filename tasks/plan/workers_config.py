"""Settings of the workers that do the parts of a run that can run in parallel."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from secateur.tasks.plan.base import Config


class WorkersConfig(Config):
    """Where segments are embedded, shards rewritten, targets replayed and audits retrained.

    Workers do not change what a run computes.
    """

    kind: Literal["threads", "processes", "dask", "ray"] = Field(
        "threads",
        description="`dask` and `ray` need the extra of that name: `pip install secateur[dask]`",
    )
    count: PositiveInt | None = Field(
        None, description="how many work at the same time; one per CPU core if null"
    )
    address: str | None = Field(
        None, description="a Dask scheduler or Ray cluster; one on this machine if null"
    )
    timeout: PositiveFloat | None = Field(
        None, description="most seconds that one task may take; no limit if null"
    )

    @model_validator(mode="after")
    def _check_address(self) -> WorkersConfig:
        if self.address is None:
            return self
        if self.kind not in ("dask", "ray"):
            raise ValueError(
                f"`address` names a Dask scheduler or a Ray cluster, and `kind` is {self.kind}"
            )
        if self.count is not None:
            raise ValueError(
                "the cluster at `address` decides how many workers there are; leave `count` out"
            )
        return self

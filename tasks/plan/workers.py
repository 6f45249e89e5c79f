"""Room `tasks.plan`: what carries out the parts of a run that can run side by side; no part of what the run is."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from secateur.tasks.plan.base import Config


class WorkersConfig(Config):
    """Where segments are embedded, indexes built, shards rewritten, targets replayed and audited samples left out."""

    kind: Literal["threads", "processes", "dask", "ray"] = Field(
        "threads",
        description="`dask` and `ray` need the extra of that name: `pip install secateur[dask]`",
    )
    count: PositiveInt | None = Field(
        None, description="how many at once; as many as the machine has cores if null"
    )
    address: str | None = Field(
        None, description="a Dask scheduler or Ray cluster; one on this machine if null"
    )
    timeout: PositiveFloat | None = Field(
        None, description="seconds that one task may take; no limit if null"
    )

    @model_validator(mode="after")
    def _one_place(self) -> WorkersConfig:
        if self.address is None:
            return self
        if self.kind not in ("dask", "ray"):
            raise ValueError(
                f"`address` is a Dask scheduler's or a Ray cluster's, and `kind` is {self.kind}"
            )
        if self.count is not None:
            raise ValueError(
                "the cluster at `address` decides how many workers there are; leave `count` out"
            )
        return self

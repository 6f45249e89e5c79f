"""Settings of the basis that contributions are reduced to."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveInt

from secateur.tasks.plan.base import Config


class KroneckerBasisConfig(Config):
    """`P_out^T C P_in` per block: at most `rank` squared coefficients."""

    kind: Literal["kronecker"] = "kronecker"
    method: Literal["pca", "random"] = "pca"
    rank: PositiveInt = 16
    fit_steps: PositiveInt = Field(
        10, description="steps the basis is fitted on; they are then run again"
    )


class CoordinateBasisConfig(Config):
    """The entries of largest energy, at least one of each block."""

    kind: Literal["coordinates"] = "coordinates"
    numbers: PositiveInt | None = Field(
        2048, description="coefficients over all blocks; null for every parameter"
    )
    fit_steps: PositiveInt = Field(
        50, description="steps the basis is fitted on; they are then run again"
    )

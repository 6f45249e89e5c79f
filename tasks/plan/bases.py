"""Room `tasks.plan`: what contributions are reduced to, and how the gradient answers a change of the parameters."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveInt

from secateur.tasks.plan.base import Config


class KroneckerBasisConfig(Config):
    """`P_out^T C P_in` a block: `rank` numbers squared."""

    kind: Literal["kronecker"] = "kronecker"
    method: Literal["pca", "random"] = "pca"
    rank: PositiveInt = 16
    fit_steps: PositiveInt = Field(10, description="steps the basis is fitted on, then rewound")


class CoordinateBasisConfig(Config):
    """The entries of most energy, as many of each block."""

    kind: Literal["coordinates"] = "coordinates"
    numbers: PositiveInt | None = Field(
        2048, description="over all blocks; null for every parameter"
    )
    fit_steps: PositiveInt = Field(10, description="steps the basis is fitted on, then rewound")


class CurvatureBase(Config):
    """How the gradient answers a change of the parameters."""

    coupling: Literal["block", "full"] = Field(
        "block", description="whether blocks answer one another"
    )


class EmpiricalFisherConfig(CurvatureBase):
    """From the recorded contributions; nothing more is computed."""

    kind: Literal["empirical_fisher"] = "empirical_fisher"


class FisherConfig(CurvatureBase):
    """From labels drawn from the model, one more pass a recorded step; the task needs `sampled(model, batch)`."""

    kind: Literal["fisher"] = "fisher"


class HessianConfig(CurvatureBase):
    """Exact in the basis, by Hessian-vector products."""

    kind: Literal["hessian"] = "hessian"
    every: PositiveInt = Field(20, description="steps that one evaluation stands for")
    samples: PositiveInt = Field(
        512, description="at most so many of those steps' samples, evenly taken"
    )


class NoCurvatureConfig(CurvatureBase):
    """The gradient does not answer."""

    kind: Literal["none"] = "none"


CurvatureConfig = Annotated[
    EmpiricalFisherConfig | FisherConfig | HessianConfig | NoCurvatureConfig,
    Field(discriminator="kind"),
]

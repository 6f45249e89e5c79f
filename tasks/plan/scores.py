"""Room `tasks.plan`: what a pruning policy reads, and how far it must be trusted."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from secateur.tasks.plan.base import Config


class ScoreConfig(Config):
    """What a pruning policy reads (DESIGN, section 4)."""

    target: str | None = Field(None, description="the target pruned for; the first one if null")
    horizon: NonNegativeInt | Literal["stage"] = Field(
        0,
        description="steps after its use at which a sample's effect is read: 0 for the contribution itself",
    )
    aggregate: Literal["mean", "nearest"] = "nearest"
    estimate: Literal["embedding", "replay"] | None = Field(
        None,
        description="`replay` runs training backwards for each target: no basis, no approximate curvature; null for replay "
        "where it can answer (`horizon: stage, aggregate: mean`), and embedding elsewhere",
    )
    temperature: PositiveFloat = Field(
        0.1,
        description="of `nearest`, in cosines: the lower, the fewer of the nearest and the most opposed target samples count",
    )


class ReplayConfig(Config):
    """How training is run backwards (`score.estimate: replay`, and audits)."""

    method: Literal["central", "jvp"] = Field(
        "central",
        description="central differences, for any kernel; or forward mode, exact, where kernels have one",
    )
    step: PositiveFloat = Field(
        1e-2,
        description="of central differences, relative to the parameters' norm; wide enough to meet kinks (ReLU)",
    )


class AuditConfig(Config):
    """True leave-one-out retraining of a few samples, to say how far scores can be trusted."""

    removals: Annotated[int, Field(ge=4)] = Field(32, description="samples left out, one at a time")
    stages: list[NonNegativeInt] | None = Field(None, description="the stages audited; all if null")
    budget: PositiveFloat = Field(
        50.0, description="what an audit may cost, in trainings of its stage"
    )


class TrialConfig(Config):
    """A short training on what a policy keeps, against as many samples at random."""

    steps: PositiveInt = Field(50, description="steps of each, from the stage's checkpoint")
    draws: PositiveInt = Field(3, description="random choices it is held against")


class TrustConfig(Config):
    """What must hold before a stage is pruned."""

    min_fidelity: Annotated[float, Field(ge=-1, le=1)] | None = Field(
        None, description="least Spearman correlation of the scores with an audit"
    )
    trial: TrialConfig | None = None
    otherwise: Literal["keep_all", "fail"] = Field(
        "keep_all", description="what happens where it does not hold"
    )


def is_effect(score: ScoreConfig) -> bool:
    """Whether scores are effects on a target's mean loss at the stage's end, which replay and audits measure."""
    return score.horizon == "stage" and score.aggregate == "mean"

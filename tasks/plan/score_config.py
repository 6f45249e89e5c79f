"""Settings of the scores that a pruning policy reads, and of the checks before pruning."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from secateur.tasks.plan.base import Config


class ScoreConfig(Config):
    """The score of a sample, which pruning policies read."""

    target: str | None = Field(None, description="the target pruned for; the first one if null")
    horizon: NonNegativeInt | Literal["stage"] = Field(
        0,
        description="how many steps after its use a sample's effect is read; 0 is the contribution "
        "itself, `stage` the stage's end",
    )
    aggregate: Literal["mean", "nearest"] = "nearest"
    estimate: Literal["embedding", "replay"] | None = Field(
        None,
        description="`replay` runs training backwards for each target: no basis, no approximate "
        "curvature. Null means replay if it can answer (`horizon: stage, aggregate: mean`), else "
        "embedding",
    )
    temperature: PositiveFloat = Field(
        0.1,
        description="of `nearest`, in cosines: the lower it is, the fewer of the most aligned and "
        "most opposed target samples count",
    )

    @property
    def is_effect(self) -> bool:
        """Whether scores are effects on a target's mean loss at the stage's end.

        Those are the effects that replay and audits measure.
        """
        return self.horizon == "stage" and self.aggregate == "mean"


class ReplayConfig(Config):
    """How training is run backwards (`score.estimate: replay`, and audits)."""

    method: Literal["central", "jvp"] = Field(
        "central",
        description="`central` differences work with any kernel; `jvp` (forward mode) is exact but "
        "needs kernels that have it",
    )
    step: PositiveFloat = Field(
        1e-2,
        description="of central differences, relative to the parameters' norm; wide enough to "
        "cross kinks (ReLU)",
    )


class AuditConfig(Config):
    """Leave-one-out retraining of a few samples, to measure how far scores can be trusted."""

    removals: Annotated[int, Field(ge=4)] = Field(32, description="samples left out, one at a time")
    stages: list[NonNegativeInt] | None = Field(
        None, description="the stages that are audited; all if null"
    )
    budget: PositiveFloat = Field(
        50.0, description="largest cost of an audit, in trainings of its stage"
    )


class TrialConfig(Config):
    """A short training on the samples that a policy keeps, compared with as many random ones."""

    steps: PositiveInt = Field(50, description="steps of each training, from the stage's end")
    draws: PositiveInt = Field(3, description="random choices to compare with")


QUESTIONS = 8  # asked if a plan demands an agreement and does not say over how many questions


class TrustConfig(Config):
    """Gates: conditions that must hold before a stage is pruned or a query is answered."""

    questions: PositiveInt | None = Field(
        None,
        description="single target samples about which each stage compares the answers of its "
        "embeddings with replay; null means 8 if `min_agreement` is set, else none",
    )
    min_agreement: Annotated[float, Field(ge=-1, le=1)] | None = Field(
        None,
        description="least Spearman correlation between a stage's answers and replay, the median "
        "over the questions: for a query by embedding or pull_back to be answered, and for a stage "
        "to be pruned by scores that are read from embeddings",
    )
    min_fidelity: Annotated[float, Field(ge=-1, le=1)] | None = Field(
        None, description="least Spearman correlation between the scores and an audit"
    )
    trial: TrialConfig | None = None
    otherwise: Literal["keep_all", "fail"] = Field(
        "keep_all", description="what happens if a gate does not hold"
    )

    @property
    def asked(self) -> int:
        """How many questions each stage is asked, to measure how far its answers agree."""
        return self.questions or (0 if self.min_agreement is None else QUESTIONS)

"""The answer to a query, and how far it can be trusted."""

from __future__ import annotations

from pydantic import BaseModel

from secateur.errors import PlanError
from secateur.tasks.results.agreement_results import AgreementResult
from secateur.tasks.run import Run


class QueryHit(BaseModel):
    """A use of a sample. A positive score means that it lowered the loss asked about.

    Attributes:
        copies: how many other samples of the stage are copies of this one, among which its value is
            split; see `count_copies`.
    """

    rank: int
    score: float
    key: str
    shard: str
    stage: int
    step: int
    window: int
    copies: int = 0


class QueryAnswer(BaseModel):
    """The samples that a query found, and how far the answer can be trusted.

    Attributes:
        estimate: how the effects were estimated.
        held: the share of the question's gradient, as squared norm, that the basis holds. None by
            replay, which needs no basis, and if an earlier version of this package wrote the stage.
        agreement: for each stage that was searched, how far such answers agree with replay, at that
            stage's own end. None if it was not measured. Empty by replay.
    """

    hits: list[QueryHit]
    estimate: str
    held: float | None
    agreement: dict[int, AgreementResult | None]

    def trust(self) -> list[str]:
        """Return in sentences how far the answer can be trusted."""
        if self.estimate == "replay":
            return ["replay counts every parameter and follows the training itself"]
        lines = [
            describe_agreement(stage, self.estimate, found)
            for stage, found in self.agreement.items()
        ]
        if self.held is not None:
            lines.append(f"the basis holds {self.held:.0%} of this question's squared gradient")
        return lines


def describe_agreement(stage: int, estimate: str, found: AgreementResult | None) -> str:
    """Return in a sentence how far a stage's answers agree with replay."""
    if found is None:
        return (
            f"stage {stage}: how far answers agree with replay was not measured; `trust.questions` "
            f"in a plan does it, or `secateur audit --questions`"
        )
    one = found.estimates[estimate]
    return (
        f"stage {stage}: answers by {estimate} about its own end agree with replay to "
        f"{one.spearman:.2f} (Spearman, median of {found.questions} single questions, the lowest "
        f"{one.lowest:.2f}); {one.found:.0%} of replay's {found.most} most helpful uses are among "
        f"their best {found.best:,} of {found.uses:,}"
    )


def check_agreement(run: Run, estimate: str, agreement: dict[int, AgreementResult | None]) -> None:
    """Check that the answers of each stage agree with replay as the plan demands.

    Raises:
        PlanError: those of a stage agree less, or it is not measured how far they do.
    """
    least = run.plan.trust.min_agreement
    if least is None:
        return
    way_out = "ask with `--estimate replay`"
    for stage, found in agreement.items():
        if found is None:
            raise PlanError(
                f"the plan demands an agreement with replay of {least:g}, and that of stage "
                f"{stage} of {run.url} is not measured yet; `secateur run` its plan, or {way_out}"
            )
        spearman = found.estimates[estimate].spearman
        if spearman < least:
            raise PlanError(
                f"answers by {estimate} in stage {stage} of {run.url} agree with replay to "
                f"{spearman:.2f}, and the plan demands {least:g}; {way_out}"
            )

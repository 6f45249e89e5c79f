"""Read how far the answers of a stage's embeddings agree with replay."""

from __future__ import annotations

import polars as pl
from pydantic import BaseModel

from secateur.storage.frames import read_frame
from secateur.tasks.run import Run

AGREEMENT = "agreement.parquet"
MEASURED = ("embedding", "pull_back")  # the estimates that are compared with replay


class Agreement(BaseModel):
    """How far one estimate agrees with replay.

    Attributes:
        spearman: correlation over all uses of the stage, the median over the questions.
        lowest: the lowest of the questions' correlations.
        found: the share of replay's most helpful uses that are among the estimate's best, the
            median over the questions.
    """

    spearman: float
    lowest: float
    found: float


class AgreementResult(BaseModel):
    """How far a stage's answers agree with replay, for questions about its own end.

    Attributes:
        questions: how many single target samples were asked about.
        uses: how many uses of samples were compared.
        held: the share of a question's gradient, as squared norm, that the basis holds; the median.
        most: how many most helpful uses by replay `found` is about.
        best: how many of an estimate's best uses they are sought among.
        cost: in trainings of the stage.
        estimates: the agreement of `embedding` and `pull_back`.
    """

    stage: int
    questions: int
    uses: int
    held: float
    most: int
    best: int
    cost: float
    estimates: dict[str, Agreement]


def read_agreement(run: Run, stage: int) -> AgreementResult:
    """Return how far a stage's answers agree with replay.

    Raises:
        StorageError: it is not measured.
    """
    return AgreementResult(**run.folder.stage(stage).agreement.manifest.facts)


def find_agreement(run: Run, stage: int) -> AgreementResult | None:
    """Return how far a stage's answers agree with replay, or None if it is not measured."""
    return read_agreement(run, stage) if run.folder.stage(stage).agreement.committed else None


def read_agreement_frame(run: Run, stage: int) -> pl.DataFrame:
    """Return the measured agreement, one row per question."""
    return read_frame(run.folder.stage(stage).agreement, AGREEMENT)

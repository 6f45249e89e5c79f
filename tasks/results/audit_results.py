"""Read what an audit found: how well each estimate agrees with retraining."""

from __future__ import annotations

import polars as pl
from pydantic import BaseModel

from secateur.storage.frames import read_frame
from secateur.storage.outputs import Output
from secateur.tasks.run import Run

AUDIT, AUDIT_PLOT = "audit.parquet", "audit.png"


class Fidelity(BaseModel):
    """Correlation of one estimate with retraining, with 95% bootstrap intervals."""

    spearman: float
    spearman_interval: tuple[float, float]
    pearson: float
    pearson_interval: tuple[float, float]


class AuditResult(BaseModel):
    """The result of an audit, for the target pruned for.

    Attributes:
        removals: how many samples were left out, one at a time.
        cost: in trainings of the stage.
        fidelity: by estimate, `embedding` and `replay`.
        plot: path or URL of a PNG that plots scores against retraining.
    """

    stage: int
    target: str
    removals: int
    seed: int
    cost: float
    fidelity: dict[str, Fidelity]
    plot: str


def audit_output(run: Run, stage: int, removals: int | None = None) -> Output:
    """Return the output of an audit, with `removals` in place of the plan's number."""
    return run.folder.stage(stage).audit(run.plan.audit_settings(removals).removals)


def read_audit(run: Run, stage: int, removals: int | None = None) -> AuditResult:
    """Return the result of a finished audit."""
    output = audit_output(run, stage, removals)
    return AuditResult(plot=output.url(AUDIT_PLOT), **output.manifest.facts)


def read_audit_frame(run: Run, stage: int) -> pl.DataFrame:
    """Return the plan's audit, one row per removal: `key`, `step`, `truth`, each estimate, ..."""
    return read_frame(audit_output(run, stage), AUDIT)

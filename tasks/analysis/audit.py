"""Audit a stage: retrain it without one sample at a time, and compare with the predicted scores."""

from __future__ import annotations

import numpy as np
import polars as pl
from scipy import stats

from secateur.storage import schemas
from secateur.storage.attempt import Attempt
from secateur.storage.frames import write_frame
from secateur.tasks.analysis.plots import draw_audit
from secateur.tasks.analysis.retraining import retraining_effects, sample_removals
from secateur.tasks.data.seeds import seed_for
from secateur.tasks.results.audit_results import (
    AUDIT,
    AUDIT_PLOT,
    AuditResult,
    Fidelity,
    audit_output,
    read_audit,
)
from secateur.tasks.results.training_results import check_replayable
from secateur.tasks.run import Run
from secateur.tasks.valuation.replay import replay_stage
from secateur.tasks.valuation.stage_effects import stage_effects

ESTIMATES = ("embedding", "replay")
RESAMPLES = 2000
INTERVAL = (2.5, 97.5)  # percentiles


def write_audit(run: Run, stage: int, removals: int | None = None) -> AuditResult:
    """Retrain a stage without one use of a sample at a time, and compare with its scores.

    The uses are a sample that is stratified by step. Each retraining starts from the segment
    checkpoint before the use and goes to the stage's end. Its change of the target's loss is
    compared with the scores by embedding and by replay.

    Args:
        removals: how many uses to leave out, in place of the plan's number.

    Raises:
        PlanError: it would cost more than the plan allows, another trainer trained the stage, or
            training does not repeat itself.
    """
    config = run.plan.audit_settings(removals)

    def write(attempt: Attempt) -> None:
        check_replayable(run, stage)
        uses, cost = sample_removals(run, stage, config)
        frame = _compare_with_retraining(run, stage, uses)
        fidelity = _measure_fidelity(run, stage, frame)
        title = f"stage {stage}, target {run.plan.pruning_target}"
        write_frame(attempt, AUDIT, frame, schemas.AUDIT)
        attempt.write(AUDIT_PLOT, draw_audit(frame, fidelity, title))
        attempt.facts.update(
            stage=stage,
            target=run.plan.pruning_target,
            removals=len(frame),
            seed=run.plan.seed,
            cost=cost,
            fidelity={name: one.model_dump(mode="json") for name, one in fidelity.items()},
        )

    inputs = {"scores": run.folder.stage(stage).scores.fingerprint}
    audit_output(run, stage, removals).write_once("audit", inputs, write)
    return read_audit(run, stage, config.removals)


def _compare_with_retraining(run: Run, stage: int, uses: pl.DataFrame) -> pl.DataFrame:
    """The uses with the true effect of leaving each out, and what each estimate predicted."""
    replay_stage(run, stage)
    rows = uses["row"].to_list()
    target = run.plan.pruning_target
    predicted = [
        pl.Series(name, stage_effects(run, stage, target, name)[rows].tolist())
        for name in ESTIMATES
    ]
    return uses.with_columns(
        pl.Series("truth", retraining_effects(run, stage, uses)),
        *predicted,
    )


def _measure_fidelity(run: Run, stage: int, frame: pl.DataFrame) -> dict[str, Fidelity]:
    seed = seed_for(run.plan.seed, "bootstrap", stage) % 2**32
    truth = frame["truth"].to_numpy()
    return {name: _fidelity(frame[name].to_numpy(), truth, seed) for name in ESTIMATES}


def _fidelity(scores: np.ndarray, truth: np.ndarray, seed: int) -> Fidelity:
    """Both correlations, with percentile-bootstrap intervals over the removals."""
    values: dict[str, float | tuple[float, float]] = {}
    for name, correlation in (("spearman", stats.spearmanr), ("pearson", stats.pearsonr)):
        values[name] = float(correlation(scores, truth).statistic)
        rng = np.random.default_rng(seed)
        resampled = []
        for _ in range(RESAMPLES):
            rows = rng.integers(len(truth), size=len(truth))
            # A resample of one value only has no correlation.
            if np.ptp(scores[rows]) > 0 and np.ptp(truth[rows]) > 0:
                resampled.append(float(correlation(scores[rows], truth[rows]).statistic))
        low, high = np.percentile(resampled, INTERVAL)
        values[f"{name}_interval"] = (float(low), float(high))
    return Fidelity.model_validate(values)

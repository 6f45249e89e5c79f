"""Room `tasks`: an audit, true retraining of a stage without one sample at a time, held against its scores."""

from __future__ import annotations

import numpy as np
import polars as pl
import torch
from pydantic import BaseModel
from scipy import stats

from secateur.influence.pullback import query_at_stage_end
from secateur.storage.frames import read_frame, write_frame
from secateur.storage.outputs import Output
from secateur.tasks.analysis.plots import draw_audit
from secateur.tasks.analysis.retraining import audit_settings, retraining_effects, sample_removals
from secateur.tasks.data.batches import seed_for
from secateur.tasks.engine.prefect_task import pipeline_task
from secateur.tasks.plan import Plan
from secateur.tasks.run.run import Run
from secateur.tasks.training.train import check_replayable
from secateur.tasks.valuation.embed import (
    in_embeddings,
    spans_of,
    stage_embeddings,
    stage_transition,
)
from secateur.tasks.valuation.replay import read_replay_scores, replay_stage
from secateur.tasks.valuation.target_gradients import read_scoring_gradients

FRAME = "audit.parquet"
RESAMPLES = 2000


class Fidelity(BaseModel):
    """Correlation of one estimate with retraining; each interval holds 95% of the bootstrap."""

    spearman: float
    spearman_interval: tuple[float, float]
    pearson: float
    pearson_interval: tuple[float, float]


class AuditResult(BaseModel):
    """What an audit came to, for the target pruned for."""

    stage: int
    target: str
    removals: int
    seed: int
    cost: float
    fidelity: dict[str, Fidelity]
    plot: str


@pipeline_task(
    "audit", makes=lambda run, stage, removals: _artefact(run, stage, removals), draws=True
)
def write_audit(run_url: str, stage: int, removals: int | None = None) -> AuditResult:
    """Retrains from the segment checkpoint to the stage's end without one use of a sample, for a sample of uses that
    is stratified by step, and holds embedding and replay scores against what that does to the target's loss.

    Args:
        removals: instead of the plan's.

    Raises:
        PlanError: it would cost more than the plan allows, another trainer trained the stage, or training does not repeat
            itself.
    """
    run = Run.open(run_url)
    spec, folder = audit_settings(run.plan, removals), run.folder.stage(stage)
    artefact = _artefact(run, stage, removals)
    if not artefact.committed:
        check_replayable(run, stage)
        uses, cost = sample_removals(run, stage, spec)
        replay_stage.fn(run_url, stage)
        columns = {"truth": retraining_effects, "embedding": _embedded, "replay": _replayed}
        frame = uses.with_columns(
            pl.Series(name, make(run, stage, uses)) for name, make in columns.items()
        )
        rng = seed_for(run.plan.seed, "bootstrap", stage) % 2**32
        fidelity = {
            name: _fidelity(frame[name].to_numpy(), frame["truth"].to_numpy(), rng)
            for name in ESTIMATES
        }
        with artefact.attempt("audit", {"scores": folder.scores.fingerprint}) as attempt:
            write_frame(attempt, FRAME, frame)
            attempt.write(
                "audit.png", draw_audit(frame, fidelity, f"stage {stage}, target {run.plan.target}")
            )
            attempt.facts.update(
                stage=stage, target=run.plan.target, removals=len(frame), seed=run.plan.seed, cost=cost,
                fidelity={name: found.model_dump(mode="json") for name, found in fidelity.items()},
            )  # fmt: skip
    return read_audit(run, stage, spec.removals)


ESTIMATES = ("embedding", "replay")


def read_audit(run: Run, stage: int, removals: int | None = None) -> AuditResult:
    """A finished audit."""
    artefact = _artefact(run, stage, removals)
    return AuditResult(plot=artefact.url("audit.png"), **artefact.manifest.facts)


def read_audit_frame(run: Run, stage: int) -> pl.DataFrame:
    """The plan's audit, one row a removal: `key`, `step`, `truth`, `embedding`, `replay` among others."""
    return read_frame(_artefact(run, stage), FRAME)


def _artefact(run: Run, stage: int, removals: int | None = None) -> Output:
    return run.folder.stage(stage).audit(audit_settings(run.plan, removals).removals)


def is_audited(plan: Plan, stage: int) -> bool:
    """Whether the plan has a stage audited, or a gate that needs it."""
    listed = plan.audit is not None and (plan.audit.stages is None or stage in plan.audit.stages)
    return listed or (plan.trust.min_fidelity is not None and plan.stages[stage].prune is not None)


def _embedded(run: Run, stage: int, uses: pl.DataFrame) -> list[float]:
    """The embeddings' scores of some uses, for the target's mean loss at the stage's end."""
    folder = run.folder.stage(stage)
    gradient = read_scoring_gradients(run, stage, run.plan.target).mean(0, keepdim=True)
    whole = torch.cat(
        query_at_stage_end(gradient, spans_of(run), stage_transition(folder.embeddings)), 1
    )
    query = in_embeddings(run, stage, whole)[0]
    products = torch.cat(
        [part.double() @ query.double() for part in stage_embeddings(folder.embeddings)]
    )
    return products[uses["row"].to_list()].tolist()


def _replayed(run: Run, stage: int, uses: pl.DataFrame) -> list[float]:
    count = len(run.folder.stage(stage).segments())
    scores = torch.cat(
        [read_replay_scores(run, stage, number)[run.plan.target] for number in range(count)]
    )
    return scores[uses["row"].to_list()].tolist()


def _fidelity(scores: np.ndarray, truth: np.ndarray, seed: int) -> Fidelity:
    """Both correlations with percentile-bootstrap intervals."""
    found: dict[str, float | tuple[float, float]] = {}
    for name, measure in (("spearman", stats.spearmanr), ("pearson", stats.pearsonr)):
        found[name] = float(measure(scores, truth).statistic)
        rng = np.random.default_rng(seed)
        sample_removals = []
        for _ in range(RESAMPLES):
            rows = rng.integers(len(truth), size=len(truth))
            if (
                np.ptp(scores[rows]) > 0 and np.ptp(truth[rows]) > 0
            ):  # a constant has no correlation
                sample_removals.append(float(measure(scores[rows], truth[rows]).statistic))
        low, high = np.percentile(sample_removals, [2.5, 97.5])
        found[f"{name}_interval"] = (float(low), float(high))
    return Fidelity.model_validate(found)

"""Room `tasks`: an audit, true retraining of a stage without one sample at a time, held against its scores."""

from __future__ import annotations

import numpy as np
import polars as pl
import torch
from prefect import task
from pydantic import BaseModel
from scipy import stats

from secateur.pullback import query_at_end
from storage.frames import read_frame, write_frame
from tasks.embed import in_embeddings, spans_of, stage_embeddings, stage_transition
from tasks.errors import PlanError
from tasks.loop import Loop
from tasks.order import Order, seed_for
from tasks.plan import Audit, Plan
from tasks.plot import scatter
from tasks.progress import track
from tasks.replay import replay, replay_scores
from tasks.run import Run
from tasks.samples import scoring_rows, stage_samples, target_samples
from tasks.score import stage_scores
from tasks.targets import target_gradients, target_loss
from tasks.train import check_repeatable, to_segment

FRAME = "audit.parquet"
RESAMPLES = 2000
REPLAY_COST = 3.5  # trainings of a stage for one target, and for each further one; see benchmarks/cost.py
FURTHER_COST = 2.2


class Fidelity(BaseModel):
    """Correlation of one estimate with retraining; each interval holds 95% of the bootstrap."""

    spearman: float
    spearman_interval: tuple[float, float]
    pearson: float
    pearson_interval: tuple[float, float]


class Audited(BaseModel):
    """What an audit came to, for the target pruned for."""

    stage: int
    target: str
    removals: int
    seed: int
    cost: float
    fidelity: dict[str, Fidelity]
    plot: str


@task(name="audit")
def audit(run_url: str, stage: int, removals: int | None = None) -> Audited:
    """Retrains from the segment checkpoint to the stage's end without one use of a sample, for a sample of uses that
    is stratified by step, and holds embedding and replay scores against what that does to the target's loss.

    Args:
        removals: instead of the plan's.

    Raises:
        PlanError: it would cost more than the plan allows, another trainer trained the stage, or training does not repeat
            itself.
    """
    run = Run.open(run_url)
    spec, folder = settings(run.plan, removals), run.folder.stage(stage)
    artefact = folder.audit(spec.removals)
    if not artefact.committed:
        check_repeatable(run, stage)
        uses = _drawn(run, stage, spec.removals)
        cost = _cost(run.plan, Order(run.plan, stage, len(stage_samples(run, stage))), uses["step"].to_list())
        _check_budget(spec, cost, stage)
        replay.fn(run_url, stage)
        columns = {"truth": _truths, "embedding": _embedded, "replay": _replayed}
        frame = uses.with_columns(pl.Series(name, make(run, stage, uses)) for name, make in columns.items())
        rng = seed_for(run.plan.seed, "bootstrap", stage) % 2**32
        fidelity = {name: _fidelity(frame[name].to_numpy(), frame["truth"].to_numpy(), rng) for name in ESTIMATES}
        with artefact.attempt("audit", {"scores": folder.scores.fingerprint}) as attempt:
            write_frame(attempt, FRAME, frame)
            attempt.write("audit.png", scatter(frame, fidelity, f"stage {stage}, target {run.plan.target}"))
            attempt.facts.update(
                stage=stage, target=run.plan.target, removals=len(frame), seed=run.plan.seed, cost=cost,
                fidelity={name: found.model_dump(mode="json") for name, found in fidelity.items()},
            )  # fmt: skip
    return audited(run, stage, spec.removals)


ESTIMATES = ("embedding", "replay")


def audited(run: Run, stage: int, removals: int | None = None) -> Audited:
    """A finished audit."""
    artefact = run.folder.stage(stage).audit(settings(run.plan, removals).removals)
    return Audited(plot=artefact.url("audit.png"), **artefact.manifest.facts)


def audit_frame(run: Run, stage: int) -> pl.DataFrame:
    """The plan's audit, one row a removal: `key`, `step`, `truth`, `embedding`, `replay` among others."""
    return read_frame(run.folder.stage(stage).audit(settings(run.plan).removals), FRAME)


def settings(plan: Plan, removals: int | None = None) -> Audit:
    """The plan's audit, or the default one."""
    spec = plan.audit or Audit()
    return spec if removals is None else spec.model_copy(update={"removals": removals})


def wanted(plan: Plan, stage: int) -> bool:
    """Whether the plan has a stage audited, or a gate that needs it."""
    listed = plan.audit is not None and (plan.audit.stages is None or stage in plan.audit.stages)
    return listed or (plan.trust.min_fidelity is not None and plan.stages[stage].prune is not None)


def expected_cost(plan: Plan, order: Order, removals: int | None = None) -> float:
    """What an audit of a stage costs, in trainings of the stage; expected over the draw of its removals."""
    steps = [step for window in order.windows() for step in window]
    drawn = np.linspace(0, len(steps) - 1, settings(plan, removals).removals).round().astype(int)
    return _cost(plan, order, [steps[i] for i in drawn])


def _cost(plan: Plan, order: Order, steps: list[int]) -> float:
    size, total = plan.segment_steps, order.steps
    return sum(1 - step // size * size / total for step in steps) + REPLAY_COST + FURTHER_COST * (len(plan.targets) - 1)


def _check_budget(spec: Audit, cost: float, stage: int) -> None:
    if cost > spec.budget:
        raise PlanError(
            f"an audit of stage {stage} with {spec.removals} removals would cost {cost:.1f} trainings of the stage, and the "
            f"plan allows {spec.budget:g}; ask for fewer removals, or raise audit.budget"
        )


def _drawn(run: Run, stage: int, removals: int) -> pl.DataFrame:
    """One use from each of equal stretches of the stage's uses, in the order of their steps."""
    uses = stage_scores(run, stage).select("sample", "key", "step", "window", "loss", "norm").with_row_index("row")
    if len(uses) < removals:
        raise PlanError(f"stage {stage} of {run.url} has {len(uses)} recorded uses, fewer than {removals} removals")
    rng = np.random.default_rng(seed_for(run.plan.seed, "audit", stage))
    strata = np.array_split(np.arange(len(uses)), removals)
    return uses[[int(rng.choice(stratum)) for stratum in strata]]


def _truths(run: Run, stage: int, uses: pl.DataFrame) -> list[float]:
    """What leaving each use out did to the target's loss at the stage's end; each segment's removals are kept."""
    samples, size = stage_samples(run, stage), run.plan.segment_steps
    loop, target = Loop(run, stage, samples), target_samples(run, run.plan.target)
    rows = torch.arange(len(target))[scoring_rows(run.plan)]
    to_segment(run, loop, stage, -(-loop.order.steps // size))
    base, found = target_loss(loop, target, rows), []
    for step, row in track(
        uses.select("step", "sample").iter_rows(), f"stage {stage}, retraining without a sample", len(uses)
    ):
        artefact = run.folder.stage(stage).removal(step, row)
        if not artefact.committed:
            to_segment(run, loop, stage, step // size)
            loop.left_out = (step, row)
            for again in range(step // size * size, loop.order.steps):
                loop.step(again)
            with artefact.attempt("removal", {}) as attempt:
                attempt.facts["loss"] = target_loss(loop, target, rows)
        found.append(float(artefact.manifest.facts["loss"]) - base)
    return found


def _embedded(run: Run, stage: int, uses: pl.DataFrame) -> list[float]:
    """The embeddings' scores of some uses, for the target's mean loss at the stage's end."""
    folder = run.folder.stage(stage)
    gradient = target_gradients(folder.targets, run.plan.target)[scoring_rows(run.plan)].mean(0, keepdim=True)
    whole = torch.cat(query_at_end(gradient, spans_of(run), stage_transition(folder.embeddings)), 1)
    query = in_embeddings(run, stage, whole)[0]
    products = torch.cat([part.double() @ query.double() for part in stage_embeddings(folder.embeddings)])
    return products[uses["row"].to_list()].tolist()


def _replayed(run: Run, stage: int, uses: pl.DataFrame) -> list[float]:
    count = len(run.folder.stage(stage).segments())
    scores = torch.cat([replay_scores(run, stage, number)[run.plan.target] for number in range(count)])
    return scores[uses["row"].to_list()].tolist()


def _fidelity(scores: np.ndarray, truth: np.ndarray, seed: int) -> Fidelity:
    """Both correlations with percentile-bootstrap intervals."""
    found: dict[str, float | tuple[float, float]] = {}
    for name, measure in (("spearman", stats.spearmanr), ("pearson", stats.pearsonr)):
        found[name] = float(measure(scores, truth).statistic)
        rng = np.random.default_rng(seed)
        drawn = []
        for _ in range(RESAMPLES):
            rows = rng.integers(len(truth), size=len(truth))
            if np.ptp(scores[rows]) > 0 and np.ptp(truth[rows]) > 0:  # a constant has no correlation
                drawn.append(float(measure(scores[rows], truth[rows]).statistic))
        low, high = np.percentile(drawn, [2.5, 97.5])
        found[f"{name}_interval"] = (float(low), float(high))
    return Fidelity.model_validate(found)

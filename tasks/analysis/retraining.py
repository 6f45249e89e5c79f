"""Room `tasks`: an audit's removals: which uses are left out, what that costs, and training again without each."""

from __future__ import annotations

import numpy as np
import polars as pl
from torch import Tensor

from secateur.errors import PlanError
from secateur.storage.shards import Samples
from secateur.tasks.data.batches import BatchSchedule, seed_for
from secateur.tasks.data.samples import list_target_samples, read_stage_samples, scoring_rows
from secateur.tasks.engine.prefect_task import pipeline_task
from secateur.tasks.engine.progress import track
from secateur.tasks.plan import AuditConfig, Plan
from secateur.tasks.run.run import Run
from secateur.tasks.training.loop import TrainingLoop
from secateur.tasks.training.train import check_replayable, restore_segment_start
from secateur.tasks.valuation.score import read_scores
from secateur.tasks.valuation.target_gradients import target_loss

REPLAY_COST = (
    3.5  # trainings of a stage for one target, and for each further one; see benchmarks/cost.py
)
FURTHER_COST = 2.2


@pipeline_task("retrain without a sample", draws=True)
def retrain_without(run_url: str, stage: int, step: int, row: int) -> None:
    """Trains from the segment checkpoint to the stage's end without the use of a sample in a step."""
    run = Run.open(run_url)
    if not run.folder.stage(stage).removal(step, row).committed:
        _retrain(_Trainer(run, stage), step, row)


def remaining_removals(
    run_url: str, stage: int, removals: int | None = None
) -> list[tuple[int, int]]:
    """The step and sample of every removal of an audit that is still to be made."""
    run = Run.open(run_url)
    folder, spec = run.folder.stage(stage), audit_settings(run.plan, removals)
    if folder.audit(spec.removals).committed:
        return []
    check_replayable(run, stage)
    uses = sample_removals(run, stage, spec)[0].select("step", "sample").iter_rows()
    return [(step, row) for step, row in uses if not folder.removal(step, row).committed]


def retraining_effects(run: Run, stage: int, uses: pl.DataFrame) -> list[float]:
    """What leaving each use out did to the target's loss at the stage's end; each removal is kept as it is made."""
    trainer = _Trainer(run, stage)
    restore_segment_start(
        run, trainer.loop, stage, -(-trainer.loop.order.steps // run.plan.segment_steps)
    )
    base, found = trainer.loss(), []
    label = f"stage {stage}, retraining without a sample"
    for step, row in track(uses.select("step", "sample").iter_rows(), label, len(uses)):
        artefact = run.folder.stage(stage).removal(step, row)
        if not artefact.committed:
            _retrain(trainer, step, row)
        found.append(float(artefact.manifest.facts["loss"]) - base)
    return found


class _Trainer:
    """A stage's loop, and the target that is looked at."""

    def __init__(self, run: Run, stage: int) -> None:
        self.run, self.stage = run, stage
        self.loop = TrainingLoop(run, stage, read_stage_samples(run, stage))
        self.target: Samples = list_target_samples(run, run.plan.target)
        self.rows: Tensor = scoring_rows(run.plan, run.plan.target, len(self.target))

    def loss(self) -> float:
        """The target's."""
        return target_loss(self.loop, self.target, self.rows)


def _retrain(trainer: _Trainer, step: int, row: int) -> None:
    run, loop, size = trainer.run, trainer.loop, trainer.run.plan.segment_steps
    restore_segment_start(run, loop, trainer.stage, step // size)
    loop.excluded = (step, row)
    for again in range(step // size * size, loop.order.steps):
        loop.step(again)
    with run.folder.stage(trainer.stage).removal(step, row).attempt("removal", {}) as attempt:
        attempt.facts["loss"] = trainer.loss()


def audit_settings(plan: Plan, removals: int | None = None) -> AuditConfig:
    """The plan's audit, or the default one."""
    spec = plan.audit or AuditConfig()
    return spec if removals is None else spec.model_copy(update={"removals": removals})


def expected_audit_cost(plan: Plan, order: BatchSchedule, removals: int | None = None) -> float:
    """What an audit of a stage costs, in trainings of the stage; expected over the draw of its removals."""
    steps = [step for window in order.windows() for step in window]
    sample_removals = (
        np.linspace(0, len(steps) - 1, audit_settings(plan, removals).removals).round().astype(int)
    )
    return _cost(plan, order, [steps[i] for i in sample_removals])


def _cost(plan: Plan, order: BatchSchedule, steps: list[int]) -> float:
    size, total = plan.segment_steps, order.steps
    return (
        sum(1 - step // size * size / total for step in steps)
        + REPLAY_COST
        + FURTHER_COST * (len(plan.targets) - 1)
    )


def _check_budget(spec: AuditConfig, cost: float, stage: int) -> None:
    if cost > spec.budget:
        raise PlanError(
            f"an audit of stage {stage} with {spec.removals} removals would cost {cost:.1f} trainings of the stage, and the "
            f"plan allows {spec.budget:g}; ask for fewer removals, or raise audit.budget"
        )


def sample_removals(run: Run, stage: int, spec: AuditConfig) -> tuple[pl.DataFrame, float]:
    """One use from each of equal stretches of the stage's uses, in the order of their steps, and what leaving them out one
    at a time costs, in trainings of the stage.

    Raises:
        PlanError: there are fewer uses, or it would cost more than the plan allows.
    """
    uses = (
        read_scores(run, stage)
        .select("sample", "key", "step", "window", "loss", "norm")
        .with_row_index("row")
    )
    if len(uses) < spec.removals:
        raise PlanError(
            f"stage {stage} of {run.url} has {len(uses)} recorded uses, fewer than {spec.removals} removals"
        )
    rng = np.random.default_rng(seed_for(run.plan.seed, "audit", stage))
    strata = np.array_split(np.arange(len(uses)), spec.removals)
    chosen = uses[[int(rng.choice(stratum)) for stratum in strata]]
    cost = _cost(
        run.plan,
        BatchSchedule(run.plan, stage, len(read_stage_samples(run, stage))),
        chosen["step"].to_list(),
    )
    _check_budget(spec, cost, stage)
    return chosen, cost

"""An audit's removals: which uses are left out, what that costs, and retraining without them."""

from __future__ import annotations

from functools import cached_property

import numpy as np
import polars as pl

from secateur.errors import PlanError
from secateur.storage.attempt import Attempt
from secateur.tasks.data.batches import BatchSchedule
from secateur.tasks.data.held_out import scoring_rows
from secateur.tasks.data.samples import list_target_samples, read_stage_samples
from secateur.tasks.data.seeds import seed_for
from secateur.tasks.engine.progress import track
from secateur.tasks.plan import AuditConfig, Plan
from secateur.tasks.results.audit_results import audit_output
from secateur.tasks.results.training_results import check_replayable
from secateur.tasks.results.valuation_results import read_scores
from secateur.tasks.run import Run
from secateur.tasks.training.loop import TrainingLoop
from secateur.tasks.training.segments import restore_segment_start, segment_bounds
from secateur.tasks.valuation.target_gradients import target_loss

# In trainings of the stage, measured by benchmarks/cost.py: one target, and each further one.
REPLAY_COST = 3.5
FURTHER_REPLAY_COST = 2.2


def retrain_without(run: Run, stage: int, step: int, row: int) -> None:
    """Train to the stage's end without the use of a sample in a step, and store the target's loss.

    Training starts from the segment checkpoint before the step.

    Args:
        row: the sample's row in the stage's sample list.
    """
    if not run.folder.stage(stage).removal(step, row).committed:
        _Retraining(run, stage).remove(step, row)


def remaining_removals(run: Run, stage: int, removals: int | None = None) -> list[tuple[int, int]]:
    """Return the step and the sample's row of each removal of an audit that is not made yet."""
    if audit_output(run, stage, removals).committed:
        return []
    check_replayable(run, stage)
    uses, _ = sample_removals(run, stage, run.plan.audit_settings(removals))
    folder = run.folder.stage(stage)
    pairs = uses.select("step", "sample").iter_rows()
    return [(step, row) for step, row in pairs if not folder.removal(step, row).committed]


def retraining_effects(run: Run, stage: int, uses: pl.DataFrame) -> list[float]:
    """Return how leaving out each use changed the target's loss at the stage's end.

    Each removal is stored once it is made, so an interrupted audit continues.
    """
    retraining = _Retraining(run, stage)
    base = retraining.loss_with_all_samples()
    effects = []
    label = f"stage {stage}, retraining without a sample"
    pairs = uses.select("step", "sample").iter_rows()
    for step, row in track(pairs, label, len(uses)):
        output = run.folder.stage(stage).removal(step, row)
        if not output.committed:
            retraining.remove(step, row)
        effects.append(float(output.manifest.facts["loss"]) - base)
    return effects


class _Retraining:
    """A stage's loop, and the loss of the pruning target."""

    def __init__(self, run: Run, stage: int) -> None:
        self._run = run
        self._stage = stage
        self._target = list_target_samples(run, run.plan.pruning_target)

    @cached_property
    def _loop(self) -> TrainingLoop:
        return TrainingLoop(self._run, self._stage, read_stage_samples(self._run, self._stage))

    def loss_with_all_samples(self) -> float:
        """The target's loss at the stage's end, as it was trained."""
        count = len(segment_bounds(self._loop.schedule))
        restore_segment_start(self._run, self._loop, self._stage, count)
        return self._loss()

    def remove(self, step: int, row: int) -> None:
        """Retrain without a use, and commit the loss."""
        loop = self._loop
        size = self._run.plan.segment_steps
        segment = step // size

        def write(attempt: Attempt) -> None:
            restore_segment_start(self._run, loop, self._stage, segment)
            loop.excluded = (step, row)
            for later in range(segment * size, loop.schedule.steps):
                loop.step(later)
            attempt.facts["loss"] = self._loss()

        folder = self._run.folder.stage(self._stage)
        folder.removal(step, row).write_once("removal", {}, write)

    def _loss(self) -> float:
        plan = self._run.plan
        rows = scoring_rows(plan, plan.pruning_target, len(self._target))
        return target_loss(self._loop, self._target, rows)


def expected_audit_cost(plan: Plan, schedule: BatchSchedule, removals: int | None = None) -> float:
    """Return the cost of an audit in trainings of the stage, expected over the draw of removals."""
    steps = [step for window in schedule.windows() for step in window]
    count = plan.audit_settings(removals).removals
    places = np.linspace(0, len(steps) - 1, count).round().astype(int)
    return _audit_cost(plan, schedule, [steps[place] for place in places])


def sample_removals(run: Run, stage: int, config: AuditConfig) -> tuple[pl.DataFrame, float]:
    """Sample the uses that an audit leaves out: one of each equal stretch of the stage's uses.

    Returns:
        The uses in the order of their steps, with their `row` in the stage's scores. The cost of
        leaving them out one at a time, in trainings of the stage.

    Raises:
        PlanError: there are fewer uses, or it would cost more than the plan allows.
    """
    columns = ("sample", "key", "step", "window", "loss", "norm")
    uses = read_scores(run, stage).select(columns).with_row_index("row")
    if len(uses) < config.removals:
        raise PlanError(
            f"stage {stage} of {run.url} has {len(uses)} recorded uses, fewer than "
            f"{config.removals} removals"
        )
    rng = np.random.default_rng(seed_for(run.plan.seed, "audit", stage))
    strata = np.array_split(np.arange(len(uses)), config.removals)
    sampled = uses[[int(rng.choice(stratum)) for stratum in strata]]
    schedule = BatchSchedule(run.plan, stage, len(read_stage_samples(run, stage)))
    cost = _audit_cost(run.plan, schedule, sampled["step"].to_list())
    if cost > config.budget:
        raise PlanError(
            f"an audit of stage {stage} with {config.removals} removals would cost {cost:.1f} "
            f"trainings of the stage, and the plan allows {config.budget:g}; ask for fewer "
            f"removals, or raise audit.budget"
        )
    return sampled, cost


def _audit_cost(plan: Plan, schedule: BatchSchedule, steps: list[int]) -> float:
    size = plan.segment_steps
    retraining = sum(1 - step // size * size / schedule.steps for step in steps)
    return retraining + REPLAY_COST + FURTHER_REPLAY_COST * (len(plan.targets) - 1)

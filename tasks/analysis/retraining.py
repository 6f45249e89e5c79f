"""Retraining of a stage without some uses, and an audit's removals and what they cost."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property

import numpy as np
import polars as pl
import torch
from jaxtyping import Int
from torch import Tensor

from secateur.errors import PlanError
from secateur.storage.attempt import Attempt
from secateur.storage.outputs import Output
from secateur.storage.shards import Samples
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
    _remove_use(Retraining(run, stage, run.plan.pruning_target), step, row)


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
    retraining = Retraining(run, stage, run.plan.pruning_target)
    base = retraining.loss_with_all_samples()
    effects = []
    label = f"stage {stage}, retraining without a sample"
    pairs = uses.select("step", "sample").iter_rows()
    for step, row in track(pairs, label, len(uses)):
        effects.append(_remove_use(retraining, step, row) - base)
    return effects


def _remove_use(retraining: Retraining, step: int, row: int) -> float:
    output = retraining.run.folder.stage(retraining.stage).removal(step, row)
    return retraining.loss_without({step: torch.tensor([row])}, output)


class Retraining:
    """A stage that is trained again without some uses, for the loss of a target at its end.

    The loss is the mean over those target samples that score training samples.
    """

    def __init__(self, run: Run, stage: int, target: str) -> None:
        self.run = run
        self.stage = stage
        self._name = target

    @cached_property
    def _target(self) -> Samples:
        return list_target_samples(self.run, self._name)

    @cached_property
    def _loop(self) -> TrainingLoop:
        return TrainingLoop(self.run, self.stage, read_stage_samples(self.run, self.stage))

    def loss_with_all_samples(self) -> float:
        """Return the target's loss at the stage's end, as it was trained."""
        count = len(segment_bounds(self._loop.schedule))
        restore_segment_start(self.run, self._loop, self.stage, count)
        return self._loss()

    def loss_without(self, uses: Mapping[int, Int[Tensor, " n"]], output: Output) -> float:
        """Return the target's loss after training without some uses.

        Training starts from the segment checkpoint before the first of them. The other samples of a
        step keep their weights.

        Args:
            uses: the samples' rows in the stage's sample list, by step.
            output: where the loss is stored, or found if it is there already.
        """

        def write(attempt: Attempt) -> None:
            attempt.facts["loss"] = self._retrain(uses)

        return float(output.write_once("removal", {}, write).facts["loss"])

    def _retrain(self, uses: Mapping[int, Int[Tensor, " n"]]) -> float:
        loop = self._loop
        size = self.run.plan.segment_steps
        segment = min(uses) // size
        restore_segment_start(self.run, loop, self.stage, segment)
        loop.excluded = dict(uses)
        for step in range(segment * size, loop.schedule.steps):
            loop.step(step)
        return self._loss()

    def _loss(self) -> float:
        rows = scoring_rows(self.run.plan, self._name, len(self._target))
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

"""The batch schedule of a stage: which samples each step uses, its learning rate and its window."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import torch
from jaxtyping import Int
from torch import Tensor

from secateur.errors import PlanError
from secateur.tasks.data.seeds import seed_for
from secateur.tasks.plan import Plan, ScheduleConfig, SelectionConfig, StageConfig, WindowConfig


@dataclass(frozen=True)
class BatchSchedule:
    """The steps of a stage, determined by the plan, the stage and the number of its samples.

    Attributes:
        plan: the run's plan.
        number: of the stage.
        samples: how many samples the stage has.
    """

    plan: Plan
    number: int
    samples: int

    @property
    def stage(self) -> StageConfig:
        """The stage's settings."""
        return self.plan.stages[self.number]

    @property
    def steps_per_epoch(self) -> int:
        """Steps per epoch. The last one may have fewer samples."""
        return math.ceil(self.samples / self.stage.batch_size)

    @property
    def steps(self) -> int:
        """Optimizer steps of the stage."""
        return self.stage.steps or (self.stage.epochs or 0) * self.steps_per_epoch

    def batch(self, step: int) -> Int[Tensor, " batch"]:
        """Return the rows of the stage's sample table that a step trains on."""
        epoch, place = divmod(step, self.steps_per_epoch)
        start = place * self.stage.batch_size
        return self._permutation(epoch)[start : start + self.stage.batch_size]

    def candidates(self, step: int, times: int) -> Int[Tensor, " candidates"]:
        """Return the rows that online selection chooses among at a step, each once.

        Candidates go through the data in their own epochs, each in a new order. The samples at an
        epoch's end that are too few for a step are not candidates in that epoch. So all samples are
        candidates equally often on average.

        Args:
            times: candidates as a multiple of the batch size.
        """
        size = times * self.stage.batch_size
        epoch, place = divmod(step, self.samples // size)
        return self._permutation(epoch, "candidates")[place * size : (place + 1) * size]

    def selection_at(self, step: int) -> tuple[int, SelectionConfig] | None:
        """Return a step's window number and online selection; None if it trains on its batch."""
        pairs = zip(self.windows(), self.stage.listed_windows, strict=True)
        for number, (window, config) in enumerate(pairs):
            if step in window and config.select:
                return number, config.select
        return None

    def _permutation(self, epoch: int, purpose: str = "order") -> Int[Tensor, " samples"]:
        # One epoch per purpose is cached, in the instance's dict because the class is frozen.
        cached = self.__dict__.get(f"_{purpose}")
        if cached is None or cached[0] != epoch:
            seed = seed_for(self.plan.seed, purpose, self.number, epoch)
            generator = torch.Generator().manual_seed(seed)
            cached = epoch, torch.randperm(self.samples, generator=generator)
            self.__dict__[f"_{purpose}"] = cached
        rows: Tensor = cached[1]
        return rows

    def seed(self, step: int) -> int:
        """Return the seed of every random draw within a step, such as dropout.

        Each step has its own, so that any step can be repeated by itself.
        """
        return seed_for(self.plan.seed, "step", self.number, step)

    def windows(self) -> list[range]:
        """Return the stage's windows, in steps.

        Raises:
            PlanError: the windows are automatic and not frozen yet, one lies outside the stage, two
                overlap, or one needs more candidates than there are samples.
        """
        if self.stage.auto_windows:
            raise PlanError(
                f"the windows of stage {self.number} are taken from {self.stage.auto_windows.auto} "
                f"when the stage begins; `secateur run` does that"
            )
        windows = [self._window(config) for config in self.stage.listed_windows]
        for early, late in pairwise(sorted(windows, key=lambda window: window.start)):
            if late.start < early.stop:
                raise PlanError(
                    f"windows of stage {self.number} overlap at step {late.start}; make them "
                    f"disjoint"
                )
        return windows

    def _window(self, config: WindowConfig) -> range:
        unit = self.steps if config.unit == "fraction" else 1
        steps = range(round(config.start * unit), round(config.stop * unit))
        name = f"window {config.start:g} to {config.stop:g} {config.unit} of stage {self.number}"
        if steps.stop > self.steps or not steps:
            raise PlanError(
                f"{name} is not within its {self.steps} steps; use fractions, or steps up to "
                f"{self.steps}"
            )
        candidates = config.select.candidates * self.stage.batch_size if config.select else 0
        if candidates > self.samples:
            raise PlanError(
                f"{name} selects among {candidates} candidates per step and the stage has "
                f"{self.samples} samples; lower `candidates` or `batch_size`"
            )
        return steps

    def rate_factor(self, step: int) -> float:
        """Return the factor by which the schedule multiplies the optimizer's rate at a step."""
        schedule = self.plan.schedule
        if schedule.over == "stage":
            return _rate_factor(schedule, step, self.steps)
        lengths = [stage.steps or 0 for stage in self.plan.stages]
        return _rate_factor(schedule, sum(lengths[: self.number]) + step, sum(lengths))


def _rate_factor(schedule: ScheduleConfig, step: int, steps: int) -> float:
    """The schedule's factor of the learning rate at a step, if it spans `steps` steps."""
    warmup = round(schedule.warmup * steps)
    if step < warmup:
        return (step + 1) / warmup
    if schedule.kind == "constant":
        return 1.0
    progress = (step - warmup) / max(1, steps - warmup)
    return schedule.final + (1 - schedule.final) * (1 + math.cos(math.pi * progress)) / 2

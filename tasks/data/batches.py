"""Room `tasks`: the order of a stage: which samples are used at which step, at what rate, in which window."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from itertools import pairwise

import torch
from jaxtyping import Int
from torch import Tensor

from secateur.errors import PlanError
from secateur.tasks.plan import (
    AutoWindowsConfig,
    Plan,
    ScheduleConfig,
    SelectionConfig,
    StageConfig,
)


def seed_for(*parts: int | str) -> int:
    """A seed that the parts determine and that no other parts share."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


@dataclass(frozen=True)
class BatchSchedule:
    """A stage's steps, determined by the plan, the stage's number and how many samples it has."""

    plan: Plan
    number: int
    samples: int

    @property
    def stage(self) -> StageConfig:
        """The stage's part of the plan."""
        return self.plan.stages[self.number]

    @property
    def steps_per_epoch(self) -> int:
        """Steps an epoch; the last one may be smaller."""
        return math.ceil(self.samples / self.stage.batch_size)

    @property
    def steps(self) -> int:
        """Optimizer steps of the stage."""
        return self.stage.steps or (self.stage.epochs or 0) * self.steps_per_epoch

    def batch(self, step: int) -> Int[Tensor, " batch"]:
        """Rows of the stage's sample table that step `step` trains on."""
        epoch, place = divmod(step, self.steps_per_epoch)
        start = place * self.stage.batch_size
        return self._permutation(epoch)[start : start + self.stage.batch_size]

    def candidates(self, step: int, times: int) -> Int[Tensor, " candidates"]:
        """Rows that online selection chooses among at a step: `times` batches of them, each once.

        They walk through the data in epochs of their own, so that all samples are candidates equally often; what is
        left at an epoch's end, too few for a step, waits for the next one's order.
        """
        size = times * self.stage.batch_size
        epoch, place = divmod(step, self.samples // size)
        return self._permutation(epoch, "candidates")[place * size : (place + 1) * size]

    def selection_at(self, step: int) -> tuple[int, SelectionConfig] | None:
        """The window that a step is in and its online selection, or None where it trains on its batch."""
        for number, (window, spec) in enumerate(zip(self.windows(), self.stage.given, strict=True)):
            if step in window and spec.select:
                return number, spec.select
        return None

    def _permutation(self, epoch: int, purpose: str = "order") -> Int[Tensor, " samples"]:
        cached = self.__dict__.get(f"_{purpose}")
        if cached is None or cached[0] != epoch:
            generator = torch.Generator().manual_seed(
                seed_for(self.plan.seed, purpose, self.number, epoch)
            )
            cached = epoch, torch.randperm(self.samples, generator=generator)
            self.__dict__[f"_{purpose}"] = cached  # one epoch at a time: a frozen dataclass's cache
        return cached[1]

    def seed(self, step: int) -> int:
        """The seed of every random draw within a step (dropout), so that any step can be run again by itself."""
        return seed_for(self.plan.seed, "step", self.number, step)

    def windows(self) -> list[range]:
        """The stage's windows, in steps.

        Raises:
            PlanError: they are automatic and not settled yet, a window lies outside the stage, two overlap, or one asks for more candidates than there are samples.
        """
        if isinstance(self.stage.windows, AutoWindowsConfig):
            raise PlanError(
                f"the windows of stage {self.number} are taken from {self.stage.windows.auto}, which happens as the stage "
                f"begins; `secateur run` does so"
            )
        ranges = []
        for window in self.stage.given:
            unit = self.steps if window.unit == "fraction" else 1
            found = range(round(window.start * unit), round(window.stop * unit))
            if found.stop > self.steps or not found:
                raise PlanError(
                    f"window {window.start:g} to {window.stop:g} {window.unit} of stage {self.number} is not within its "
                    f"{self.steps} steps; use fractions, or steps up to {self.steps}"
                )
            asked = window.select.candidates * self.stage.batch_size if window.select else 0
            if asked > self.samples:
                raise PlanError(
                    f"window {window.start:g} to {window.stop:g} {window.unit} of stage {self.number} selects among {asked} "
                    f"candidates a step and the stage has {self.samples} samples; lower `candidates` or `batch_size`"
                )
            ranges.append(found)
        for early, late in pairwise(sorted(ranges, key=lambda r: r.start)):
            if late.start < early.stop:
                raise PlanError(
                    f"windows of stage {self.number} overlap at step {late.start}; make them disjoint"
                )
        return ranges

    def rate(self, step: int) -> float:
        """Learning rate of a step, as a share of the unscheduled one."""
        schedule = self.plan.schedule
        if schedule.over == "stage":
            return _factor(schedule, step, self.steps)
        lengths = [stage.steps or 0 for stage in self.plan.stages]
        return _factor(schedule, sum(lengths[: self.number]) + step, sum(lengths))


def _factor(schedule: ScheduleConfig, step: int, steps: int) -> float:
    """The schedule's share of the rate at a step of `steps`."""
    warm = round(schedule.warmup * steps)
    if step < warm:
        return (step + 1) / warm
    if schedule.kind == "constant":
        return 1.0
    progress = (step - warm) / max(1, steps - warm)
    return schedule.final + (1 - schedule.final) * (1 + math.cos(math.pi * progress)) / 2

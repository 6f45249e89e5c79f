"""Read the influence profile of a stage, and the phases found in it."""

from __future__ import annotations

from typing import Literal

import numpy as np
import polars as pl
from pydantic import BaseModel

from secateur.storage.frames import read_frame
from secateur.tasks.run import Run

PROFILE, EVOLUTION = "profile.parquet", "evolution.parquet"
PROFILE_PLOT, EVOLUTION_PLOT = "profile.png", "evolution.png"

PhaseName = Literal["warm-up", "basin", "ascent"]


class Phase(BaseModel):
    """A piece of a phase. Phases that rise or fall have several pieces.

    Attributes:
        level: the geometric mean of influence over learning rate.
    """

    name: PhaseName
    start: int
    stop: int
    level: float


class Boundary(BaseModel):
    """The step at which one piece ends and the next begins, with its 95% interval."""

    step: int
    low: int
    high: int


class Phases(BaseModel):
    """A stage's phases. There are none if its profile is flat, or was not recorded in full.

    Attributes:
        steps: of the stage.
        recorded: how many of them are in the profile.
        support: the share of resampled profiles in which the same phases are found.
    """

    steps: int
    recorded: int
    phases: list[Phase]
    boundaries: list[Boundary]
    support: float

    @property
    def is_complete(self) -> bool:
        """Whether the profile covers every step of the stage."""
        return self.recorded >= self.steps

    def ratio_to_basin(self, name: PhaseName) -> float | None:
        """Return a phase's level over the basin's; None if either is missing."""
        level = self._level(name)
        basin = self._level("basin")
        return None if level is None or basin is None else level / basin

    def _level(self, name: PhaseName) -> float | None:
        """The geometric mean over all steps of a phase."""
        pieces = [phase for phase in self.phases if phase.name == name]
        if not pieces:
            return None
        lengths = [phase.stop - phase.start for phase in pieces]
        return float(np.exp(np.average(np.log([p.level for p in pieces]), weights=lengths)))


def read_phases(run: Run, stage: int, target: str) -> Phases:
    """Return the phases of a stage whose profile is written, as seen from its own end."""
    facts = run.folder.stage(stage).profile.manifest.facts
    return Phases.model_validate(facts["phases"][target])


def read_profile(run: Run, stage: int) -> pl.DataFrame:
    """Return a stage's `profile.parquet`; see `write_profile` for its columns."""
    return read_frame(run.folder.stage(stage).profile, PROFILE)

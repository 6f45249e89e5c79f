"""The influence profile: how each step's samples affected the targets, as seen from a stage's end.

Influence is the effect on a target's mean loss, whatever score the plan prunes by.

`profile.parquet` has one row per recorded step (`stage`, `step`, its learning rate `rate`),
`target`, `estimate` and `quantity`, with `count`, `mean`, `std`, `mean_abs` and five quantiles over
the step's samples. The quantity is:

- `score`: the effect itself;
- `per_rate`: the effect over the learning rate (Wang et al., 2025, section 5.3);
- `relative`: that over the norms of the contribution and of the target's gradient, which can be
  compared between runs.

The `estimate` is `embedding`. For earlier stages the query is pulled back through the stages after
them. The stage's own steps also have `replay` if the plan scores by it.

`evolution.parquet` has, for each `stage` and `target`, its mean influence over learning rate as
seen from the end of each stage, `view`, from its own to this one (figure 4 there).
"""

from __future__ import annotations

import polars as pl

from secateur.errors import PlanError
from secateur.storage import schemas
from secateur.storage.attempt import Attempt
from secateur.storage.frames import write_frame
from secateur.tasks.analysis.phases import find_phases
from secateur.tasks.analysis.plots import draw_evolution, draw_profile
from secateur.tasks.analysis.profile_frames import evolution_rows, profile_rows, profile_series
from secateur.tasks.results.profile_results import (
    EVOLUTION,
    EVOLUTION_PLOT,
    PROFILE,
    PROFILE_PLOT,
    Phases,
)
from secateur.tasks.results.training_results import end_checkpoint, read_training_result
from secateur.tasks.run import Run


def write_profile(run: Run, stage: int) -> str:
    """Write the profile of all steps up to a stage's end as seen from there, and its evolution.

    Returns:
        Path or URL of the plot.

    Raises:
        PlanError: the stage is not scored yet.
    """
    folder = run.folder.stage(stage)
    end_checkpoint(run, stage)
    if not folder.scores.committed:
        raise PlanError(
            f"stage {stage} of {run.url} is not scored yet; `secateur run` its plan, or prune the "
            f"stage, first"
        )

    def write(attempt: Attempt) -> None:
        # The evolution needs the view of every earlier stage.
        for earlier in range(stage):
            write_profile(run, earlier)
        frame = pl.concat(profile_rows(run, stage))
        evolution = evolution_rows(run, stage, frame)
        phases = _find_phases(run, stage, frame)
        write_frame(attempt, PROFILE, frame, schemas.PROFILE)
        write_frame(attempt, EVOLUTION, evolution, schemas.EVOLUTION)
        _write_plots(attempt, run, stage, frame, evolution, phases)
        attempt.facts["phases"] = {
            target: found.model_dump(mode="json") for target, found in phases.items()
        }

    folder.profile.write_once("profile", {"scores": folder.scores.fingerprint}, write)
    return folder.profile.url(PROFILE_PLOT)


def _find_phases(run: Run, stage: int, frame: pl.DataFrame) -> dict[str, Phases]:
    """The phases of the stage's own steps, for every target."""
    steps = read_training_result(run, stage).steps
    return {
        target: find_phases(*profile_series(frame, stage, target), steps)
        for target in run.plan.targets
    }


def _write_plots(
    attempt: Attempt,
    run: Run,
    stage: int,
    frame: pl.DataFrame,
    evolution: pl.DataFrame,
    phases: dict[str, Phases],
) -> None:
    title = f"{run.plan.run}, stage {stage}"
    attempt.write(PROFILE_PLOT, draw_profile(frame, phases, stage, title))
    if stage:
        title = f"{run.plan.run}, stages 0 to {stage}"
        attempt.write(EVOLUTION_PLOT, draw_evolution(evolution, title))

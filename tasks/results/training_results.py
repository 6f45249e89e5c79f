"""Read what training a stage left: its segments, checkpoints and online selections."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Int
from pydantic import BaseModel
from torch import Tensor

from secateur.errors import PlanError
from secateur.storage.frames import read_frame
from secateur.storage.layout import StageFolder
from secateur.storage.ledger import CHECKPOINT
from secateur.storage.outputs import Output
from secateur.tasks.run import Run

SECATEUR = "secateur"  # the trainer's name in a ledger that `secateur run` wrote
SELECTION = "selection.parquet"
SELECTION_FACTS = "selection"


class TrainingResult(BaseModel):
    """The result of training a stage.

    Attributes:
        by: whose loop trained it: `secateur`, or the name of another trainer that recorded it.
        candidates: samples that online selection looked at.
        chosen: samples that it chose.
    """

    stage: int
    samples: int
    steps: int
    segments: int
    by: str
    candidates: int = 0
    chosen: int = 0


def read_training_result(run: Run, stage: int) -> TrainingResult:
    """Return the result of training a stage that is trained to its end."""
    return TrainingResult(**run.folder.stage(stage).trained.manifest.facts)


def count_segments(run: Run, stage: int, trainer: str) -> int:
    """Return how many segments of a stage are committed, all of them by one trainer.

    Raises:
        PlanError: another trainer made them.
    """
    segments = run.folder.stage(stage).segments()
    if segments and (by := segments[0].manifest.facts["by"]) != trainer:
        raise PlanError(
            f"stage {stage} of {run.url} was begun by another trainer ({by}); continue with that "
            f"one, or start a run of another name"
        )
    return len(segments)


def start_checkpoint(run: Run, stage: int) -> Output:
    """Return the output that holds the checkpoint a stage starts from.

    Raises:
        PlanError: the stage before is unfinished.
    """
    if stage == 0:
        return run.folder.stage(0).start
    return end_checkpoint(run, stage - 1)


def end_checkpoint(run: Run, stage: int) -> Output:
    """Return the output that holds the checkpoint of a trained stage's end.

    Raises:
        PlanError: there is no such stage, or it is not trained to its end.
    """
    if not 0 <= stage < len(run.plan.stages):
        raise PlanError(f"{run.url} has no stage {stage}; its last is {len(run.plan.stages) - 1}")
    folder = run.folder.stage(stage)
    if not folder.trained.committed:
        raise PlanError(
            f"stage {stage} of {run.url} is not trained to its end; `secateur run` its plan first"
        )
    return folder.segment(read_training_result(run, stage).segments - 1)


def check_checkpoints(run: Run, stage: int) -> None:
    """Check that the checkpoints within a stage are still there, which not every plan keeps.

    Raises:
        PlanError: some were removed.
    """
    # The first one is removed first. If it is the stage's end, it is kept.
    if run.folder.stage(stage).segment(0).is_removed(CHECKPOINT):
        raise PlanError(
            f"the checkpoints within stage {stage} of {run.url} are removed already (its plan has "
            f"`checkpoints: {{keep: stage_ends}}`), and replay, audits and TracIn start from them; "
            f"run the plan with `keep: segments` and another `run` name"
        )


def check_replayable(run: Run, stage: int) -> None:
    """Check that a stage's training can be repeated, which replay and audits do.

    Raises:
        PlanError: it is not trained to its end, another trainer's loop trained it, or the
            checkpoints that it would start from are removed.
    """
    end_checkpoint(run, stage)
    by = read_training_result(run, stage).by
    if by != SECATEUR:
        raise PlanError(
            f"stage {stage} of {run.url} was trained by another trainer ({by}), whose steps cannot "
            f"be repeated; replay and audit need a stage that `secateur run` trained, so set "
            f"`score.estimate: embedding` and leave out `audit`"
        )
    check_checkpoints(run, stage)


def read_process_counts(folder: StageFolder) -> list[int]:
    """Return how many processes trained each committed segment of a stage."""
    return [int(segment.manifest.facts.get("processes", 1)) for segment in folder.segments()]


def read_selected_rows(folder: StageFolder) -> dict[int, Int[Tensor, " batch"]]:
    """Return the rows that online selection chose for each step, in the order of training.

    Only committed segments are read.
    """
    selected: dict[int, Tensor] = {}
    for segment in folder.segments():
        if SELECTION_FACTS not in segment.manifest.facts:
            continue
        frame = read_frame(segment, SELECTION, ["step", "sample", "rank"])
        chosen = frame.drop_nulls("rank").sort("step", "rank")
        for (step,), rows in chosen.group_by("step", maintain_order=True):
            selected[int(str(step))] = torch.from_numpy(rows["sample"].to_numpy().astype(np.int64))
    return selected


def count_selected(folder: StageFolder) -> dict[str, int]:
    """Return how many `candidates` online selection had, and how many were `chosen`.

    Only committed segments count.
    """
    facts = [segment.manifest.facts.get(SELECTION_FACTS, {}) for segment in folder.segments()]
    return {key: sum(one.get(key, 0) for one in facts) for key in ("candidates", "chosen")}

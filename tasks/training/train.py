"""Room `tasks`: training one stage, segment by segment, with every segment's ledger and checkpoint kept together."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

from jaxtyping import Float, Int
from pydantic import BaseModel
from torch import Tensor

from secateur.errors import PlanError
from secateur.influence.recorder import Recorder
from secateur.influence.segment import Segment
from secateur.storage.ledger import read_checkpoint, write_checkpoint, write_ledger
from secateur.storage.outputs import Attempt, Output
from secateur.tasks.data.batches import BatchSchedule
from secateur.tasks.data.samples import read_stage_samples
from secateur.tasks.engine.prefect_task import pipeline_task
from secateur.tasks.engine.progress import track
from secateur.tasks.engine.ui_artifacts import ProgressArtifact
from secateur.tasks.run.run import Run
from secateur.tasks.training.checkpoint import Tensors
from secateur.tasks.training.curvature_passes import record_curvature
from secateur.tasks.training.loop import TrainingLoop
from secateur.tasks.training.online_selection import (
    OnlineSelector,
    count_selected,
    read_selected_rows,
)

SECATEUR = "secateur"


class TrainingResult(BaseModel):
    """What training a stage came to; `by` says whose loop it was: `secateur`, or another that recorded into the run.
    `candidates` and `chosen` count what online selection looked at and took."""

    stage: int
    samples: int
    steps: int
    segments: int
    by: str
    candidates: int = 0
    chosen: int = 0


@pipeline_task("train", makes=lambda run, stage: run.folder.stage(stage).trained, draws=True)
def train_stage(run_url: str, stage: int) -> TrainingResult:
    """Trains a stage from the end of the one before, recording contributions; carries on at the last whole segment.

    Raises:
        PlanError: the stage before is unfinished, another trainer has begun this one, a window lies outside the stage, a
            sample cannot be decoded, or a loss is not finite.
    """
    run = Run.open(run_url)
    folder = run.folder.stage(stage)
    if folder.trained.committed:
        return TrainingResult(**folder.trained.manifest.facts)
    samples = read_stage_samples(run, stage)
    order = BatchSchedule(run.plan, stage, len(samples))
    bounds = segment_bounds(order)
    done = count_segments(run, stage, SECATEUR)
    if done < len(bounds):
        order.windows()
        loop = TrainingLoop(run, stage, samples)
        _begin(run, loop, stage, done)
        recorder = loop.recorder()
        selector = OnlineSelector(loop, recorder)
        live = ProgressArtifact(run, f"stage-{stage}-training", order.steps)
        for number, steps in list(enumerate(bounds))[done:]:
            recorder.start_at(steps.start)
            began = time.monotonic()
            label = f"stage {stage}, segment {number + 1} of {len(bounds)}"
            for step in track(steps, label, len(steps)):
                selector.choose(step)
                recording = step_recording(recorder, order, step)
                record_curvature(
                    recorder,
                    loop,
                    range(step, steps.stop),
                    (step - steps.start),
                    recording is not None,
                )
                loop.step(step, recording)
                live.reach(step + 1)
            noted = partial(_note, selector, began)
            commit_segment(run, stage, number, recorder.take(), loop.tensors(), SECATEUR, noted)
    counts = count_selected(folder)
    trained = TrainingResult(
        stage=stage,
        samples=len(samples),
        steps=order.steps,
        segments=len(bounds),
        by=SECATEUR,
        **counts,
    )
    return commit_trained(run, trained)


def _note(selector: OnlineSelector, began: float, attempt: Attempt) -> None:
    """What our own loop adds to a segment: what online selection decided, and the seconds it took."""
    selector.write(attempt)
    attempt.facts["seconds"] = time.monotonic() - began


def commit_segment(
    run: Run,
    stage: int,
    number: int,
    segment: Segment,
    state: Tensors,
    by: str,
    note: Callable[[Attempt], None] = lambda _: None,
) -> bool:
    """Commits a segment's ledger and the checkpoint at its end, together.

    Args:
        by: whose loop trained it.
        note: adds to the attempt what else that loop has to tell.

    Returns:
        Whether this attempt's stands, and not that of another process which was first.
    """
    artefact = run.folder.stage(stage).segment(number)
    with artefact.attempt("segment", {"basis": run.folder.basis.fingerprint}) as attempt:
        write_ledger(attempt, segment.tensors(), segment.first_step)
        write_checkpoint(attempt, state)
        note(attempt)
        steps = segment.first_step, segment.first_step + segment.length
        attempt.facts.update(
            stage=stage, first_step=steps[0], next_step=steps[1], seed=run.plan.seed, by=by
        )
    return artefact.manifest.attempt == attempt.root.url.rpartition("/")[2]


def count_segments(run: Run, stage: int, trainer: str) -> int:
    """How many segments of a stage are committed, all of them by one trainer.

    Raises:
        PlanError: another trainer has made them.
    """
    segments = run.folder.stage(stage).segments()
    if segments and (by := segments[0].manifest.facts["by"]) != trainer:
        raise PlanError(
            f"stage {stage} of {run.url} was begun by another trainer ({by}); go on with that one, or start a run of another "
            f"name"
        )
    return len(segments)


def commit_trained(run: Run, trained: TrainingResult) -> TrainingResult:
    """Says, once its last segment is committed, that a stage is wholly trained."""
    folder = run.folder.stage(trained.stage)
    if not folder.trained.committed:
        last = folder.segment(trained.segments - 1)
        with folder.trained.attempt("trained", {"segment": last.fingerprint}) as attempt:
            attempt.facts.update(trained.model_dump())
    return TrainingResult(**folder.trained.manifest.facts)


def segment_bounds(order: BatchSchedule) -> list[range]:
    """The steps of each segment of a stage."""
    size = order.plan.segment_steps
    return [range(start, min(start + size, order.steps)) for start in range(0, order.steps, size)]


def step_recording(
    recorder: Recorder, order: BatchSchedule, step: int
) -> Callable[[Int[Tensor, " b"], Float[Tensor, " b"]], Any] | None:
    """How a step is recorded: in its window, for the curvature only, or not at all."""
    place = window_of_step(order.windows(), order.stage.stride, step)
    if place is None:
        return None
    window, stride = place
    return lambda rows, weights: recorder.batch(rows, weights, window=window, stride=stride)


def window_of_step(windows: list[range], stride: int, step: int) -> tuple[int, float] | None:
    """The window that a step falls in and how many steps it stands for; window -1 where it serves the curvature only, None
    where it is not recorded."""
    inside = [number for number, window in enumerate(windows) if step in window]
    if inside:
        return inside[0], 1.0
    return (-1, float(stride)) if step % stride == 0 else None


def start_checkpoint(run: Run, stage: int) -> Output:
    """The artefact whose checkpoint a stage starts from.

    Raises:
        PlanError: the stage before is unfinished.
    """
    if stage == 0:
        return run.folder.stage(0).start
    return end_checkpoint(run, stage - 1)


def end_checkpoint(run: Run, stage: int) -> Output:
    """The artefact whose checkpoint is a trained stage's end.

    Raises:
        PlanError: there is no such stage, or it is not wholly trained.
    """
    if not 0 <= stage < len(run.plan.stages):
        raise PlanError(f"{run.url} has no stage {stage}; its last is {len(run.plan.stages) - 1}")
    folder = run.folder.stage(stage)
    if not folder.trained.committed:
        raise PlanError(
            f"stage {stage} of {run.url} is not wholly trained; `secateur run` its plan first"
        )
    return folder.segment(TrainingResult(**folder.trained.manifest.facts).segments - 1)


def check_replayable(run: Run, stage: int) -> None:
    """Whether a stage's training can be run again, which replay and audits do.

    Raises:
        PlanError: it is not wholly trained, or another trainer's loop trained it.
    """
    end_checkpoint(run, stage)
    if (by := run.folder.stage(stage).trained.manifest.facts["by"]) != SECATEUR:
        raise PlanError(
            f"stage {stage} of {run.url} was trained by another trainer ({by}), whose steps cannot be run again; replay and "
            f"audit need a stage that `secateur run` trained, so ask for `score.estimate: embedding` and no audit"
        )


def _begin(run: Run, loop: TrainingLoop, stage: int, done: int) -> None:
    """Brings the loop to the start of segment `done`, whose checkpoint is made where it is the run's own beginning."""
    if stage == 0 and not run.folder.stage(0).start.committed:
        with run.folder.stage(0).start.attempt("checkpoint", {}) as attempt:
            write_checkpoint(attempt, loop.tensors())
    restore_segment_start(run, loop, stage, done)


def restore_segment_start(run: Run, loop: TrainingLoop, stage: int, number: int) -> None:
    """Gives the loop the state that a segment of a stage starts from, and what was chosen for the steps already trained."""
    if not loop.chosen:
        loop.chosen.update(read_selected_rows(run.folder.stage(stage)))
    if number:
        loop.restore(read_checkpoint(run.folder.stage(stage).segment(number - 1)))
    else:
        carried = run.plan.optimizer.at_stage == "carry" and stage > 0
        loop.restore(read_checkpoint(start_checkpoint(run, stage)), optimizer=carried)

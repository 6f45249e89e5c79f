"""Train one stage, segment by segment, and record contributions."""

from __future__ import annotations

import time
from functools import partial

from secateur.influence.recorder import Recorder
from secateur.storage.attempt import Attempt
from secateur.storage.ledger import write_checkpoint
from secateur.tasks.data.batches import BatchSchedule
from secateur.tasks.data.samples import read_stage_samples
from secateur.tasks.engine.progress import track
from secateur.tasks.engine.ui_artifacts import ProgressArtifact
from secateur.tasks.results.training_results import (
    SECATEUR,
    TrainingResult,
    count_segments,
    count_selected,
    read_training_result,
)
from secateur.tasks.run import Run
from secateur.tasks.training.loop import Recording, TrainingLoop
from secateur.tasks.training.online_selection import OnlineSelector
from secateur.tasks.training.segments import (
    commit_segment,
    commit_training_result,
    restore_segment_start,
    segment_bounds,
    window_of_step,
)


def train_stage(run: Run, stage: int) -> TrainingResult:
    """Train a stage from the end of the one before, and record contributions.

    An interrupted training continues after its last committed segment.

    Raises:
        PlanError: the stage before is unfinished, another trainer has begun this one, a window lies
            outside the stage, a sample cannot be decoded, or a loss is not finite.
    """
    folder = run.folder.stage(stage)
    if folder.trained.committed:
        return read_training_result(run, stage)
    samples = read_stage_samples(run, stage)
    schedule = BatchSchedule(run.plan, stage, len(samples))
    segments = segment_bounds(schedule)
    committed = count_segments(run, stage, SECATEUR)
    if committed < len(segments):
        schedule.windows()  # raises before anything is trained
        loop = TrainingLoop(run, stage, samples)
        _start_loop(run, loop, stage, committed)
        _train_segments(run, loop, segments, committed)
    result = TrainingResult(
        stage=stage,
        samples=len(samples),
        steps=schedule.steps,
        segments=len(segments),
        by=SECATEUR,
        **count_selected(folder),
    )
    return commit_training_result(run, result)


def _start_loop(run: Run, loop: TrainingLoop, stage: int, number: int) -> None:
    """Bring the loop to the start of a segment. In stage 0, commit the run's first checkpoint."""
    if stage == 0:

        def write(attempt: Attempt) -> None:
            write_checkpoint(attempt, loop.capture_state())

        run.folder.stage(0).start.write_once("checkpoint", {}, write)
    restore_segment_start(run, loop, stage, number)


def _train_segments(run: Run, loop: TrainingLoop, segments: list[range], committed: int) -> None:
    stage = loop.schedule.number
    recorder = loop.recorder()
    selector = OnlineSelector(loop, recorder)
    progress = ProgressArtifact(run, f"stage-{stage}-training", loop.schedule.steps)
    for number, steps in list(enumerate(segments))[committed:]:
        recorder.start_at(steps.start)
        started = time.monotonic()
        label = f"stage {stage}, segment {number + 1} of {len(segments)}"
        for step in track(steps, label, len(steps)):
            _train_step(loop, recorder, selector, steps, step)
            progress.update(step + 1)
        add_facts = partial(_add_facts, selector, started)
        # Neither is kept in a variable, or it would be in memory while the next segment is trained.
        commit_segment(
            run, stage, number, recorder.take_segment(), loop.capture_state(), SECATEUR, add_facts
        )


def _train_step(
    loop: TrainingLoop, recorder: Recorder, selector: OnlineSelector, segment: range, step: int
) -> None:
    selector.choose(step)
    recording = _step_recording(recorder, loop, step)
    recorded = recording is not None
    loop.run.plan.curvature.record_step(recorder, loop, segment, step, recorded)
    loop.step(step, recording)


def _step_recording(recorder: Recorder, loop: TrainingLoop, step: int) -> Recording | None:
    """How a step is recorded: in its window, for the curvature only, or not at all (None)."""
    schedule = loop.schedule
    place = window_of_step(schedule.windows(), schedule.stage.stride, step)
    if place is None:
        return None
    window, stride = place
    return lambda part: recorder.batch(
        part.rows, part.weights, window, stride, loop.losses_of(part.tensors), part.documents
    )


def _add_facts(selector: OnlineSelector, started: float, attempt: Attempt) -> None:
    """Add the decisions of online selection to a segment, and the seconds it was trained for."""
    selector.write(attempt)
    attempt.facts["seconds"] = time.monotonic() - started

"""Train one stage, segment by segment, and record contributions."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial

from secateur.influence.process_group import Ranks
from secateur.influence.recorded_batch import RecordedBatch
from secateur.influence.recorder import Recorder
from secateur.storage.attempt import Attempt
from secateur.storage.ledger import write_checkpoint
from secateur.storage.shards import Samples
from secateur.tasks.data.batches import BatchSchedule
from secateur.tasks.data.samples import read_stage_samples
from secateur.tasks.engine.progress import track
from secateur.tasks.engine.ui_artifacts import ProgressArtifact
from secateur.tasks.plan import LaunchConfig
from secateur.tasks.results.training_results import (
    SECATEUR,
    TrainingResult,
    count_segments,
    count_selected,
    read_training_result,
)
from secateur.tasks.run import Run
from secateur.tasks.training.launch import train_in_processes
from secateur.tasks.training.loop import MicroBatch, Recording, TrainingLoop
from secateur.tasks.training.online_selection import OnlineSelector
from secateur.tasks.training.segments import (
    commit_segment,
    commit_training_result,
    restore_segment_start,
    segment_bounds,
    window_of_step,
)


def train_stage(run: Run, stage: int, launch: LaunchConfig | None = None) -> TrainingResult:
    """Train a stage from the end of the one before, and record contributions.

    An interrupted training continues after its last committed segment.

    Args:
        launch: the processes that train; those of the plan that started the run if None.

    Raises:
        PlanError: the stage before is unfinished, another trainer has begun this one, a window lies
            outside the stage, a sample cannot be decoded, or a loss is not finite.
        SecateurError: a model or optimizer cannot be followed, or a training process was killed.
    """
    if run.folder.stage(stage).trained.committed:
        return read_training_result(run, stage)
    samples = read_stage_samples(run, stage)
    schedule = BatchSchedule(run.plan, stage, len(samples))
    schedule.windows()  # raises before anything is trained
    committed = count_segments(run, stage, SECATEUR)
    progress = ProgressArtifact(run, f"stage-{stage}-training", schedule.steps)
    launch = launch or run.plan.launch
    if launch.processes > 1 and committed < len(segment_bounds(schedule)):
        done = min(committed * run.plan.segment_steps, schedule.steps)
        steps = train_in_processes(run, stage, launch, done)
        label = f"stage {stage}, {launch.processes} processes"
        for step in track(steps, label, schedule.steps, done):
            progress.update(step + 1)
        return read_training_result(run, stage)
    return train_segments(run, stage, samples, on_step=progress.update)


def train_segments(
    run: Run,
    stage: int,
    samples: Samples,
    ranks: Ranks | None = None,
    shard: str = "none",
    on_step: Callable[[int], None] = lambda _: None,
) -> TrainingResult:
    """Train the segments of a stage that are not committed yet.

    Args:
        ranks: this process among those that train. All must call this.
        shard: how they divide the model, as in the plan's `launch`.
        on_step: is called with the number of steps that are done.
    """
    ranks = ranks or Ranks()
    folder = run.folder.stage(stage)
    schedule = BatchSchedule(run.plan, stage, len(samples))
    segments = segment_bounds(schedule)
    committed = count_segments(run, stage, SECATEUR)
    if committed < len(segments):
        loop = TrainingLoop(run, stage, samples, ranks, shard)
        _start_loop(run, loop, stage, committed)
        _train_segments(run, loop, segments, committed, on_step)
    result = TrainingResult(
        stage=stage,
        samples=len(samples),
        steps=schedule.steps,
        segments=len(segments),
        by=SECATEUR,
        **count_selected(folder),
    )
    with ranks.first_goes_first():
        return commit_training_result(run, result)


def _start_loop(run: Run, loop: TrainingLoop, stage: int, number: int) -> None:
    """Bring the loop to the start of a segment. In stage 0, commit the run's first checkpoint."""
    start = run.folder.stage(0).start
    if stage == 0 and not loop.ranks.first_decides(start.committed):
        state = loop.capture_state()
        with loop.ranks.first_goes_first():
            if loop.ranks.is_first:
                start.write_once("checkpoint", {}, partial(write_checkpoint, tensors=state))
    restore_segment_start(run, loop, stage, number)


def _train_segments(
    run: Run,
    loop: TrainingLoop,
    segments: list[range],
    committed: int,
    on_step: Callable[[int], None],
) -> None:
    stage = loop.schedule.number
    recorder = loop.recorder()
    selector = OnlineSelector(loop, recorder)
    for number, steps in list(enumerate(segments))[committed:]:
        recorder.start_at(steps.start)
        started = time.monotonic()
        label = f"stage {stage}, segment {number + 1} of {len(segments)}"
        # The process that started several others shows their progress.
        for step in track(steps, label, len(steps)) if loop.ranks.size == 1 else steps:
            _train_step(loop, recorder, selector, steps, step)
            on_step(step + 1)
        add_facts = partial(_add_facts, selector, started, loop.ranks.size)
        _commit(run, loop, number, recorder, add_facts)


def _commit(
    run: Run,
    loop: TrainingLoop,
    number: int,
    recorder: Recorder,
    add_facts: Callable[[Attempt], None],
) -> None:
    """Commit a segment. All processes must call it, and the first one writes."""
    # They are variables here only, or they would be in memory while the next segment is trained.
    segment = recorder.take_segment()
    state = loop.capture_state()
    with loop.ranks.first_goes_first():
        if loop.ranks.is_first:
            stage = loop.schedule.number
            commit_segment(run, stage, number, segment, state, SECATEUR, add_facts)


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

    def record(part: MicroBatch) -> AbstractContextManager[RecordedBatch]:
        # The parameters of a sharded model are whole in its own passes only, all processes at once.
        losses_of = None if loop.is_sharded else loop.losses_of(part.tensors)
        return recorder.batch(part.rows, part.weights, window, stride, losses_of, part.documents)

    return record


def _add_facts(selector: OnlineSelector, started: float, processes: int, attempt: Attempt) -> None:
    """Add to a segment the decisions of online selection, and how it was trained."""
    selector.write(attempt)
    attempt.facts["processes"] = processes
    attempt.facts["seconds"] = time.monotonic() - started

"""The segments of a stage: where they begin, committing them, and going back to one's start."""

from __future__ import annotations

from collections.abc import Callable

from secateur.influence.segment import Segment
from secateur.storage.attempt import Attempt
from secateur.storage.ledger import read_checkpoint, write_checkpoint, write_ledger
from secateur.tasks.data.batches import BatchSchedule
from secateur.tasks.data.collate import Tensors
from secateur.tasks.results.training_results import (
    TrainingResult,
    read_process_counts,
    read_selected_rows,
    read_training_result,
    start_checkpoint,
)
from secateur.tasks.run import Run
from secateur.tasks.training.checkpoint_removal import remove_checkpoint_before, remove_checkpoints
from secateur.tasks.training.loop import TrainingLoop


def segment_bounds(schedule: BatchSchedule) -> list[range]:
    """Return the steps of each segment of a stage."""
    size = schedule.plan.segment_steps
    starts = range(0, schedule.steps, size)
    return [range(start, min(start + size, schedule.steps)) for start in starts]


def commit_segment(
    run: Run,
    stage: int,
    number: int,
    segment: Segment,
    state: Tensors,
    by: str,
    add_facts: Callable[[Attempt], None] = lambda _: None,
) -> bool:
    """Commit a segment's ledger together with the checkpoint at its end.

    The checkpoint before it is removed if the plan needs it no more.

    Args:
        by: whose loop trained it.
        add_facts: adds to the attempt what else that loop records.

    Returns:
        Whether this process's attempt was committed. It was not if another process was first.
    """
    output = run.folder.stage(stage).segment(number)
    with output.attempt("segment", {"basis": run.folder.basis.fingerprint}) as attempt:
        write_ledger(attempt, segment.tensors(), segment.first_step)
        write_checkpoint(attempt, state)
        add_facts(attempt)
        attempt.facts.update(
            stage=stage,
            first_step=segment.first_step,
            next_step=segment.first_step + segment.length,
            seed=run.plan.seed,
            by=by,
        )
    remove_checkpoint_before(run, stage, number)
    return output.manifest.attempt == attempt.root.url.rpartition("/")[2]


def commit_training_result(run: Run, result: TrainingResult) -> TrainingResult:
    """Commit that a stage is trained to its end, after its last segment.

    The checkpoints within the stage that the plan needs no more are gone then.
    """
    folder = run.folder.stage(result.stage)
    last = folder.segment(result.segments - 1)

    def write(attempt: Attempt) -> None:
        attempt.facts.update(result.model_dump())

    remove_checkpoints(run, result.stage)
    folder.trained.write_once("trained", {"segment": last.fingerprint}, write)
    return read_training_result(run, result.stage)


def restore_segment_start(run: Run, loop: TrainingLoop, stage: int, number: int) -> None:
    """Give the loop the state that a segment starts from, and how its batches were made.

    These are the rows selected in training, and the number of processes that divided them.
    """
    if not loop.selected_rows:
        loop.selected_rows.update(read_selected_rows(run.folder.stage(stage)))
    if not loop.segment_processes:
        loop.segment_processes = read_process_counts(run.folder.stage(stage))
    if number:
        loop.load_state(read_checkpoint(run.folder.stage(stage).segment(number - 1)))
    else:
        carried = run.plan.optimizer.at_stage == "carry" and stage > 0
        loop.load_state(read_checkpoint(start_checkpoint(run, stage)), optimizer=carried)


def window_of_step(windows: list[range], stride: int, step: int) -> tuple[int, float] | None:
    """Return the window of a step, and how many steps its curvature stands for.

    Returns:
        Window -1 if the step is recorded for the curvature only; None if it is not recorded.
    """
    for number, window in enumerate(windows):
        if step in window:
            return number, 1.0
    return (-1, float(stride)) if step % stride == 0 else None

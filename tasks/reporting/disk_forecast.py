"""The size of each stage's outputs on disk, foretold from the plan and the samples."""

from __future__ import annotations

from pydantic import BaseModel

from secateur.tasks.data.batches import BatchSchedule
from secateur.tasks.plan import Plan
from secateur.tasks.reporting.forecast_sizes import INDEX_BYTES, Sizes

RECORD_BYTES = 56  # of a ledger record, besides its coefficients
GRADIENT_BYTES = 16  # of a gradient for the curvature, besides its coefficients


class StageEstimate(BaseModel):
    """One stage's expected size, with its windows in steps.

    Samples of later stages follow from the fractions that the policies keep, if they have one.

    Attributes:
        checkpoint_bytes: of the most checkpoints that there are at one time. The first stage has
            the one that the run starts from as well.
        kept_checkpoint_bytes: of those that stay when the stage is finished.
        replay_bytes: of replay's adjoints at most, two per target at one time.
        question_bytes: of the adjoints of the plan's questions at most, two each at one time. They
            are removed once the answers are compared.
    """

    stage: int
    samples: int
    steps: int
    windows: list[tuple[int, int]]
    records: int
    ledger_bytes: int
    embedding_bytes: int
    index_bytes: int
    checkpoint_bytes: int
    kept_checkpoint_bytes: int
    replay_bytes: int
    question_bytes: int


def estimate_stage(plan: Plan, number: int, samples: int, sizes: Sizes) -> StageEstimate:
    """Return the size of a stage that trains on so many samples."""
    schedule = BatchSchedule(plan, number, samples)
    windows = schedule.windows()
    selected_steps = sum(len(window) for window in windows)
    recorded_steps = selected_steps + (schedule.steps - selected_steps) // schedule.stage.stride
    batch = min(schedule.stage.batch_size, samples)
    slots = sizes.rule.state_tensors
    # Embeddings keep the optimizer's slots only if its state crosses the stage's end.
    columns = sizes.width * (slots if plan.optimizer.at_stage == "carry" else 1)
    kept = sizes.components or columns
    # Reduced embeddings have their directions beside them, and where these lead in earlier stages.
    directions = (1 if number == 0 else 2) * (sizes.components or 0) * sizes.width * sizes.item
    uses = selected_steps * batch
    segments = -(-schedule.steps // plan.segment_steps)
    most, staying = _count_checkpoints(plan, number, segments)
    checkpoint = sizes.weights + sizes.slots
    start = sizes.weights if number == 0 else 0  # before the first step there are no slots
    replayed = plan.estimate == "replay" or plan.audits(number)
    adjoints = min(segments, 2) * slots * sizes.trained  # of one target or question
    return StageEstimate(
        stage=number,
        samples=samples,
        steps=schedule.steps,
        windows=[(window.start, window.stop) for window in windows],
        records=uses,
        ledger_bytes=_ledger_bytes(plan, sizes, schedule.steps, recorded_steps, batch),
        embedding_bytes=uses * kept * sizes.item + directions,
        index_bytes=uses * kept * INDEX_BYTES[plan.index],
        checkpoint_bytes=start + most * checkpoint,
        kept_checkpoint_bytes=start + staying * checkpoint,
        replay_bytes=len(plan.targets) * adjoints * replayed,
        question_bytes=plan.trust.asked * adjoints,
    )


def largest_disk(stages: list[StageEstimate]) -> int:
    """Return the largest size of all stages' outputs together, at any time."""
    largest = held = 0
    for stage in stages:
        lasting = (
            stage.ledger_bytes + stage.embedding_bytes + stage.index_bytes + stage.replay_bytes
        )
        # Each segment's own embeddings are on disk until the stage's are composed from them. The
        # questions are replayed later.
        passing = max(stage.embedding_bytes, stage.question_bytes)
        largest = max(largest, held + lasting + passing + stage.checkpoint_bytes)
        held += lasting + stage.kept_checkpoint_bytes
    return largest


def _count_checkpoints(plan: Plan, number: int, segments: int) -> tuple[int, int]:
    """How many segments have their checkpoint at most, and how many when the stage is finished."""
    if plan.checkpoints.keep == "segments":
        return segments, segments
    # Without a reader, a segment's checkpoint is removed when the next one is committed.
    return segments if plan.checkpoint_readers(number) else min(segments, 2), 1


def _ledger_bytes(plan: Plan, sizes: Sizes, steps: int, recorded: int, batch: int) -> int:
    coefficients = sizes.width * sizes.item
    total = recorded * batch * (coefficients + RECORD_BYTES) + steps * sizes.step
    segments = [
        min(plan.segment_steps, steps - start) for start in range(0, steps, plan.segment_steps)
    ]
    for length in segments:
        # Windows may leave some segments without a record, so this is their share.
        gradients = plan.curvature.count_gradients(sizes.task, length, batch) * recorded // steps
        total += gradients * (coefficients + GRADIENT_BYTES)
        total += plan.curvature.count_matrices(length) * sizes.coupled
    return total

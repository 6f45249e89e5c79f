"""Replay a stage backwards for some questions, segment by segment from the checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from secateur.errors import PlanError
from secateur.influence.adjoint import step_back
from secateur.influence.directional_derivatives import LossPart
from secateur.influence.tape import Adjoint, ParameterGroups, Tape
from secateur.storage.ledger import read_checkpoint
from secateur.storage.outputs import Output
from secateur.storage.shards import Samples
from secateur.storage.tensors import TensorStack, read_tensors, write_tensors
from secateur.tasks.data.held_out import scoring_rows
from secateur.tasks.data.samples import list_target_samples, read_stage_samples
from secateur.tasks.engine.progress import track
from secateur.tasks.results.training_results import check_replayable, end_checkpoint
from secateur.tasks.results.valuation_results import REPLAY_FILE, REPLAY_SCORES
from secateur.tasks.run import Run
from secateur.tasks.training.loop import MicroBatch, TrainingLoop
from secateur.tasks.training.optimizers import plan_update_rule
from secateur.tasks.training.segments import restore_segment_start, segment_bounds
from secateur.tasks.valuation.stored_steps import StoredSteps
from secateur.tasks.valuation.target_gradients import mean_gradient

ADJOINT_FILE = "adjoint.safetensors"
# Largest relative distance between the end of a repeated segment and its checkpoint.
REPRODUCED = 1e-3

T = TypeVar("T")
# Returns some samples, and the places among them of those whose mean loss is asked about.
Ask = Callable[[], tuple[Samples, Int[Tensor, " n"]]]


def replay_stage(run: Run, stage: int, targets: list[str] | None = None) -> int:
    """Score every selected record of a stage for targets, by the adjoint of its training.

    Some targets (all if None) are walked together, as by `replay_questions`.

    Returns:
        Number of segments.

    Raises:
        PlanError: another trainer trained the stage, or training does not repeat itself exactly on
            this machine.
    """
    names = targets or run.plan.targets
    questions = {name: partial(_scoring_samples, run, name) for name in names}
    return replay_questions(run, stage, questions)


def replay_questions(run: Run, stage: int, questions: Mapping[str, Ask]) -> int:
    """Score every selected record of a stage for questions, which are walked together.

    One segment's states are on disk, and those of one step in memory. Segments that an interrupted
    walk committed are not walked again.

    Args:
        questions: for every name, returns the samples whose mean loss is asked about.

    Returns:
        Number of segments.

    Raises:
        PlanError: another trainer trained the stage, or training does not repeat itself exactly on
            this machine.
    """
    folder = run.folder.stage(stage)
    check_replayable(run, stage)
    loop = TrainingLoop(run, stage, read_stage_samples(run, stage))
    segments = segment_bounds(loop.schedule)
    adjoints: dict[str, Adjoint] = {}
    for number in reversed(range(len(segments))):
        missing = [name for name in questions if not folder.replay(name, number).committed]
        if not missing:
            adjoints = {}
            continue
        for name in missing:
            if name not in adjoints:
                adjoints[name] = _adjoint_after(run, loop, number, name, questions[name])
        # Taken from the dict, so that they can be released while the walk replaces them.
        later = {name: adjoints.pop(name) for name in missing}
        scores, adjoints = walk_back(run, loop, number, segments[number], later)
        for name, adjoint in adjoints.items():
            _commit_replay(run, stage, number, name, scores[name], adjoint)
    return len(segments)


def group_walks(questions: Sequence[T], count: int) -> list[list[T]]:
    """Divide targets or questions into at most `count` groups, one walk each.

    A further one in a walk costs less than another walk.
    """
    return [list(questions[start::count]) for start in range(min(count, len(questions)))]


def last_replay_outputs(run: Run, stage: int, targets: list[str] | None) -> list[Output]:
    """Return the outputs that a walk writes last, one per target."""
    return [run.folder.stage(stage).replay(name, 0) for name in targets or run.plan.targets]


def _commit_replay(
    run: Run, stage: int, number: int, name: str, scores: Tensor, adjoint: Adjoint
) -> None:
    """Commit a segment's scores, and the adjoint at its start, from which the walk goes on.

    The adjoint of the segment after it, which is as large as a checkpoint, is removed.
    """
    folder = run.folder.stage(stage)
    inputs = {"segment": folder.segment(number).fingerprint}
    with folder.replay(name, number).attempt("replay", inputs) as attempt:
        tensors = {f"{group:05d}": part for group, part in enumerate(adjoint)}
        write_tensors(attempt, REPLAY_FILE, {REPLAY_SCORES: scores}, {})
        write_tensors(attempt, ADJOINT_FILE, tensors, {})
    later = folder.replay(name, number + 1)
    if later.committed:
        later.remove_file(ADJOINT_FILE)


def walk_back(
    run: Run, loop: TrainingLoop, number: int, steps: range, adjoints: dict[str, Adjoint]
) -> tuple[dict[str, Float[Tensor, " records"]], dict[str, Adjoint]]:
    """Train one segment again with its states on disk, then go back through it for each adjoint.

    Args:
        number: of the segment.
        steps: of the segment.
        adjoints: at its end, by name.

    Returns:
        The scores of its selected records, and the adjoints at its start, by name.
    """
    with TensorStack() as stack:
        tape = _repeat_segment(run, loop, number, steps, stack)
        return _walk_tape(run, loop, number, steps, tape, adjoints)


def _walk_tape(
    run: Run,
    loop: TrainingLoop,
    number: int,
    steps: range,
    tape: Tape,
    adjoints: dict[str, Adjoint],
) -> tuple[dict[str, Float[Tensor, " records"]], dict[str, Adjoint]]:
    """Go back through a segment whose steps are on the tape."""
    stage = loop.schedule.number
    windows = loop.schedule.windows()
    empty = torch.empty(0, dtype=torch.float64)
    scores: dict[str, list[Tensor]] = {name: [empty] for name in adjoints}
    label = f"stage {stage}, replaying segment {number}"
    for step in track(reversed(steps), label, len(steps)):
        parts = [
            LossPart(partial(_losses, loop, part), part.weights)
            for part in loop.micro_batches(step)
        ]
        reseed = partial(torch.manual_seed, loop.schedule.seed(step))
        state = tape.steps.pop()
        is_selected = any(step in window for window in windows)
        for name, adjoint in adjoints.items():
            step_scores, adjoints[name] = step_back(
                loop.model,
                tape.groups,
                state,
                tape.update_rule,
                parts,
                adjoint,
                run.plan.replay.method,
                reseed,
                run.plan.replay.step,
            )
            if is_selected:
                scores[name].insert(0, step_scores)
    return {name: torch.cat(found) for name, found in scores.items()}, adjoints


def _repeat_segment(
    run: Run, loop: TrainingLoop, number: int, steps: range, stack: TensorStack
) -> Tape:
    stage = loop.schedule.number
    restore_segment_start(run, loop, stage, number)
    stored = StoredSteps(stack, run.plan.device)
    tape = Tape(loop.model, loop.optimizer, lambda: loop.scale, stored)
    for step in track(steps, f"stage {stage}, repeating segment {number}", len(steps)):
        loop.step(step)
    tape.close()
    _check_reproduced(run, loop, number)
    return tape


def _losses(loop: TrainingLoop, part: MicroBatch, model: nn.Module) -> Tensor:
    return loop.part_losses(part, model)


def _check_reproduced(run: Run, loop: TrainingLoop, number: int) -> None:
    stage = loop.schedule.number
    stored = read_checkpoint(run.folder.stage(stage).segment(number))
    for name, tensor in loop.capture_state().items():
        if name.startswith("model.") and tensor.is_floating_point():
            distance = float((tensor - stored[name]).norm())
            # Written so that a distance of nan is refused too.
            if not distance <= REPRODUCED * float(stored[name].norm()) + 1e-12:
                raise PlanError(
                    f"segment {number} of stage {stage} of {run.url} does not repeat itself "
                    f"({name} is {distance:.2g} away from its checkpoint); make model and task "
                    f"deterministic, because replay and audit train again"
                )


def _adjoint_after(run: Run, loop: TrainingLoop, number: int, name: str, ask: Ask) -> Adjoint:
    """A question's adjoint at the end of a segment.

    It is stored with the next segment's replay. At the stage's end it is the gradient of the loss
    asked about, in all parameters.
    """
    folder = run.folder.stage(loop.schedule.number)
    if number < len(folder.segments()) - 1:
        tensors = read_tensors(folder.replay(name, number + 1), ADJOINT_FILE)
        return [tensors[group] for group in sorted(tensors)]
    return start_adjoint(run, loop, *ask())


def _scoring_samples(run: Run, target: str) -> tuple[Samples, Int[Tensor, " n"]]:
    samples = list_target_samples(run, target)
    return samples, scoring_rows(run.plan, target, len(samples))


def start_adjoint(
    run: Run, loop: TrainingLoop, samples: Samples, rows: Int[Tensor, " n"]
) -> Adjoint:
    """Return the adjoint of some samples' mean loss at the end of the loop's stage."""
    loop.load_state(read_checkpoint(end_checkpoint(run, loop.schedule.number)))
    slots = len(plan_update_rule(run.plan.optimizer).slots)
    groups = ParameterGroups(loop.model, loop.optimizer)
    return groups.start_adjoint(mean_gradient(loop, samples, rows), slots)

"""Room `tasks`: replaying a stage backwards for its targets, segment by segment from the checkpoints (DESIGN, section 3)."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from secateur.errors import PlanError
from secateur.influence.adjoint import Adjoint, LossPart, ParameterGroups, Tape, step_back
from secateur.storage.ledger import read_checkpoint
from secateur.storage.outputs import Output
from secateur.storage.tensors import read_tensors, write_tensors
from secateur.tasks.data.samples import list_target_samples, read_stage_samples, scoring_rows
from secateur.tasks.engine.prefect_task import pipeline_task
from secateur.tasks.engine.progress import track
from secateur.tasks.run.run import Run
from secateur.tasks.training.loop import MicroBatch, TrainingLoop, eval_mode
from secateur.tasks.training.optimizer import plan_update_rule
from secateur.tasks.training.train import (
    check_replayable,
    end_checkpoint,
    restore_segment_start,
    segment_bounds,
)
from secateur.tasks.valuation.target_gradients import EVALUATION_BATCH

SCORES, ADJOINT = "scores", "adjoint"
FILE = "replay.safetensors"
REPRODUCED = 1e-3  # relative distance of a replayed segment's end from its checkpoint


@pipeline_task("replay", makes=lambda run, stage, targets: _first(run, stage, targets), draws=True)
def replay_stage(run_url: str, stage: int, targets: list[str] | None = None) -> int:
    """Scores every selected record of a stage by the adjoint of its training, some targets (or all) in one walk.

    Memory is one segment's states. What an earlier, interrupted walk has committed is taken as it is.

    Returns:
        Number of segments.

    Raises:
        PlanError: the stage was trained by another trainer, or training does not repeat itself on this machine.
    """
    run = Run.open(run_url)
    folder = run.folder.stage(stage)
    check_replayable(run, stage)
    loop = TrainingLoop(run, stage, read_stage_samples(run, stage))
    bounds = segment_bounds(loop.order)
    later: dict[str, Adjoint] = {}
    for number in reversed(range(len(bounds))):
        missing = [t for t in targets or run.plan.targets if not folder.replay(t, number).committed]
        if not missing:
            later = {}
            continue
        later = {
            t: later[t] if t in later else _adjoint_after(run, loop, stage, number, t)
            for t in missing
        }
        scores, later = _walk(run, loop, stage, number, bounds[number], later)
        for name, q in later.items():
            inputs = {"segment": folder.segment(number).fingerprint}
            with folder.replay(name, number).attempt("replay", inputs) as attempt:
                adjoints = {f"{ADJOINT}/{group:05d}": part for group, part in enumerate(q)}
                write_tensors(attempt, FILE, {SCORES: scores[name], **adjoints}, {})
    return len(bounds)


def group_targets(targets: list[str], count: int) -> list[list[str]]:
    """The targets in at most `count` groups, one walk each: a further target costs less than another walk."""
    return [targets[start::count] for start in range(min(count, len(targets)))]


def read_replay_scores(run: Run, stage: int, number: int) -> dict[str, Tensor]:
    """Every target's scores of a segment's selected records, in the order of its ledger."""
    folder = run.folder.stage(stage)
    return {
        target: read_tensors(folder.replay(target, number), FILE)[SCORES]
        for target in run.plan.targets
    }


def _first(run: Run, stage: int, targets: list[str] | None) -> list[Output]:
    """What a walk makes last."""
    return [run.folder.stage(stage).replay(target, 0) for target in targets or run.plan.targets]


def _walk(
    run: Run, loop: TrainingLoop, stage: int, number: int, steps: range, later: dict[str, Adjoint]
) -> tuple[dict[str, Tensor], dict[str, Adjoint]]:
    """One segment: forwards, keeping its states, then backwards for each target."""
    restore_segment_start(run, loop, stage, number)
    tape = Tape(loop.model, loop.optimizer, lambda: loop.scale)
    for step in track(steps, f"stage {stage}, repeating segment {number}", len(steps)):
        loop.step(step)
    tape.close()
    _check_repeated(run, loop, stage, number)
    windows, spec = loop.order.windows(), run.plan.replay
    rows: dict[str, list[Tensor]] = {name: [torch.empty(0, dtype=torch.float64)] for name in later}
    for step in track(reversed(steps), f"stage {stage}, replaying segment {number}", len(steps)):
        parts = [
            LossPart(partial(_losses, loop, part), part.weights)
            for part in loop.micro_batches(step)
        ]
        reseed = partial(torch.manual_seed, loop.order.seed(step))
        moment, selected = tape.moments.pop(), any(step in window for window in windows)
        for name, q in later.items():
            scores, later[name] = step_back(
                loop.model,
                tape.groups,
                moment,
                tape.update_rule,
                parts,
                q,
                spec.method,
                reseed,
                spec.step,
            )
            if selected:
                rows[name].insert(0, scores)
    return {name: torch.cat(found) for name, found in rows.items()}, later


def _losses(loop: TrainingLoop, part: MicroBatch, model: nn.Module) -> Tensor:
    return loop.task.losses(model, part.tensors)


def _check_repeated(run: Run, loop: TrainingLoop, stage: int, number: int) -> None:
    stored = read_checkpoint(run.folder.stage(stage).segment(number))
    for name, tensor in loop.tensors().items():
        if name.startswith("model.") and tensor.is_floating_point():
            distance = float((tensor - stored[name]).norm())
            if not distance <= REPRODUCED * float(stored[name].norm()) + 1e-12:
                raise PlanError(
                    f"segment {number} of stage {stage} of {run.url} does not repeat itself ({name} is {distance:.2g} away "
                    f"from its checkpoint); make model and task deterministic, for replay and audit train again"
                )


def _adjoint_after(run: Run, loop: TrainingLoop, stage: int, number: int, target: str) -> Adjoint:
    """A target's adjoint at the end of a segment: where the next was replayed before, or its loss gradient, in all
    parameters, at the stage's end."""
    folder = run.folder.stage(stage)
    if number < len(folder.segments()) - 1:
        tensors = read_tensors(folder.replay(target, number + 1), FILE)
        return [tensors[name] for name in sorted(tensors) if name.startswith(f"{ADJOINT}/")]
    loop.restore(read_checkpoint(end_checkpoint(run, stage)))
    slots = len(plan_update_rule(run.plan.optimizer).slots)
    return ParameterGroups(loop.model, loop.optimizer).adjoint(_gradient(run, loop, target), slots)


def _gradient(run: Run, loop: TrainingLoop, target: str) -> dict[str, Tensor]:
    """The gradient of a target's mean loss."""
    samples = list_target_samples(run, target)
    scoring = scoring_rows(run.plan, target, len(samples))
    named = {name: p for name, p in loop.model.named_parameters() if p.requires_grad}
    total = [torch.zeros_like(p) for p in named.values()]
    with eval_mode(loop.model):
        for rows in scoring.split(EVALUATION_BATCH):
            loss = loop.task.losses(loop.model, loop.batch(rows, samples)).sum() / len(scoring)
            found = torch.autograd.grad(loss, list(named.values()), materialize_grads=True)
            total = [a + b for a, b in zip(total, found, strict=True)]
    return dict(zip(named, total, strict=True))

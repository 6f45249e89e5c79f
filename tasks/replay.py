"""Room `tasks`: replaying a stage backwards for its targets, segment by segment from the checkpoints (DESIGN, section 3)."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from secateur.replay import Adjoint, Groups, Part, Tape, step_back
from storage.ledger import read_checkpoint
from storage.manifest import Artefact
from storage.tensors import read_tensors, write_tensors
from tasks.behaviour import task
from tasks.errors import PlanError
from tasks.loop import Loop, MicroBatch, evaluating
from tasks.optimizer import linearised
from tasks.progress import track
from tasks.run import Run
from tasks.samples import scoring_rows, stage_samples, target_samples
from tasks.targets import EVALUATION_BATCH
from tasks.train import check_repeatable, end_checkpoint, segment_bounds, to_segment

SCORES, ADJOINT = "scores", "adjoint"
FILE = "replay.safetensors"
REPRODUCED = 1e-3  # relative distance of a replayed segment's end from its checkpoint


@task("replay", makes=lambda run, stage, targets: _first(run, stage, targets), draws=True)
def replay(run_url: str, stage: int, targets: list[str] | None = None) -> int:
    """Scores every selected record of a stage by the adjoint of its training, some targets (or all) in one walk.

    Memory is one segment's states. What an earlier, interrupted walk has committed is taken as it is.

    Returns:
        Number of segments.

    Raises:
        PlanError: the stage was trained by another trainer, or training does not repeat itself on this machine.
    """
    run = Run.open(run_url)
    folder = run.folder.stage(stage)
    check_repeatable(run, stage)
    loop = Loop(run, stage, stage_samples(run, stage))
    bounds = segment_bounds(loop.order)
    later: dict[str, Adjoint] = {}
    for number in reversed(range(len(bounds))):
        missing = [t for t in targets or run.plan.targets if not folder.replay(t, number).committed]
        if not missing:
            later = {}
            continue
        later = {t: later[t] if t in later else _adjoint_after(run, loop, stage, number, t) for t in missing}
        scores, later = _walk(run, loop, stage, number, bounds[number], later)
        for name, q in later.items():
            inputs = {"segment": folder.segment(number).fingerprint}
            with folder.replay(name, number).attempt("replay", inputs) as attempt:
                adjoints = {f"{ADJOINT}/{group:05d}": part for group, part in enumerate(q)}
                write_tensors(attempt, FILE, {SCORES: scores[name], **adjoints}, {})
    return len(bounds)


def groups_of(targets: list[str], count: int) -> list[list[str]]:
    """The targets in at most `count` groups, one walk each: a further target costs less than another walk."""
    return [targets[start::count] for start in range(min(count, len(targets)))]


def replay_scores(run: Run, stage: int, number: int) -> dict[str, Tensor]:
    """Every target's scores of a segment's selected records, in the order of its ledger."""
    folder = run.folder.stage(stage)
    return {target: read_tensors(folder.replay(target, number), FILE)[SCORES] for target in run.plan.targets}


def _first(run: Run, stage: int, targets: list[str] | None) -> list[Artefact]:
    """What a walk makes last."""
    return [run.folder.stage(stage).replay(target, 0) for target in targets or run.plan.targets]


def _walk(
    run: Run, loop: Loop, stage: int, number: int, steps: range, later: dict[str, Adjoint]
) -> tuple[dict[str, Tensor], dict[str, Adjoint]]:
    """One segment: forwards, keeping its states, then backwards for each target."""
    to_segment(run, loop, stage, number)
    tape = Tape(loop.model, loop.optimizer, lambda: loop.scale)
    for step in track(steps, f"stage {stage}, repeating segment {number}", len(steps)):
        loop.step(step)
    tape.close()
    _check_repeated(run, loop, stage, number)
    windows, spec = loop.order.windows(), run.plan.replay
    rows: dict[str, list[Tensor]] = {name: [torch.empty(0, dtype=torch.float64)] for name in later}
    for step in track(reversed(steps), f"stage {stage}, replaying segment {number}", len(steps)):
        parts = [Part(partial(_losses, loop, part), part.weights) for part in loop.micro_batches(step)]
        reseed = partial(torch.manual_seed, loop.order.seed(step))
        moment, selected = tape.moments.pop(), any(step in window for window in windows)
        for name, q in later.items():
            scores, later[name] = step_back(
                loop.model, tape.groups, moment, tape.linearised, parts, q, spec.method, reseed, spec.step
            )
            if selected:
                rows[name].insert(0, scores)
    return {name: torch.cat(found) for name, found in rows.items()}, later


def _losses(loop: Loop, part: MicroBatch, model: nn.Module) -> Tensor:
    return loop.task.losses(model, part.tensors)


def _check_repeated(run: Run, loop: Loop, stage: int, number: int) -> None:
    stored = read_checkpoint(run.folder.stage(stage).segment(number))
    for name, tensor in loop.tensors().items():
        if name.startswith("model.") and tensor.is_floating_point():
            distance = float((tensor - stored[name]).norm())
            if not distance <= REPRODUCED * float(stored[name].norm()) + 1e-12:
                raise PlanError(
                    f"segment {number} of stage {stage} of {run.url} does not repeat itself ({name} is {distance:.2g} away "
                    f"from its checkpoint); make model and task deterministic, for replay and audit train again"
                )


def _adjoint_after(run: Run, loop: Loop, stage: int, number: int, target: str) -> Adjoint:
    """A target's adjoint at the end of a segment: where the next was replayed before, or its loss gradient, in all
    parameters, at the stage's end."""
    folder = run.folder.stage(stage)
    if number < len(folder.segments()) - 1:
        tensors = read_tensors(folder.replay(target, number + 1), FILE)
        return [tensors[name] for name in sorted(tensors) if name.startswith(f"{ADJOINT}/")]
    loop.restore(read_checkpoint(end_checkpoint(run, stage)))
    slots = len(linearised(run.plan.optimizer).slots)
    return Groups(loop.model, loop.optimizer).adjoint(_gradient(run, loop, target), slots)


def _gradient(run: Run, loop: Loop, target: str) -> dict[str, Tensor]:
    """The gradient of a target's mean loss."""
    samples = target_samples(run, target)
    scoring = scoring_rows(run.plan, target, len(samples))
    named = {name: p for name, p in loop.model.named_parameters() if p.requires_grad}
    total = [torch.zeros_like(p) for p in named.values()]
    with evaluating(loop.model):
        for rows in scoring.split(EVALUATION_BATCH):
            loss = loop.task.losses(loop.model, loop.batch(rows, samples)).sum() / len(scoring)
            found = torch.autograd.grad(loss, list(named.values()), materialize_grads=True)
            total = [a + b for a, b in zip(total, found, strict=True)]
    return dict(zip(named, total, strict=True))

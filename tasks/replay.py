"""Room `tasks`: replaying a stage backwards for its targets, segment by segment from the checkpoints (DESIGN, section 3)."""

from __future__ import annotations

from functools import partial

import torch
from prefect import task
from torch import Tensor, nn

from secateur.replay import Adjoint, Groups, Part, Tape, step_back
from storage.ledger import read_checkpoint
from storage.manifest import Artefact
from storage.tensors import read_tensors, write_tensors
from tasks.errors import PlanError
from tasks.loop import Loop, MicroBatch, evaluating
from tasks.optimizer import linearised
from tasks.progress import track
from tasks.run import Run
from tasks.samples import scoring_rows, stage_samples, target_samples
from tasks.targets import EVALUATION_BATCH
from tasks.train import check_repeatable, end_checkpoint, segment_bounds, to_segment

SCORES = "scores"
FILE = "replay.safetensors"
REPRODUCED = 1e-3  # relative distance of a replayed segment's end from its checkpoint


@task(name="replay")
def replay(run_url: str, stage: int) -> int:
    """Scores every selected record of a stage by the adjoint of its training, all targets in one walk.

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
    targets = list(run.plan.targets)
    later: dict[str, Adjoint] = {}
    for number in reversed(range(len(bounds))):
        artefact = folder.replay(number)
        if artefact.committed:
            continue
        if not later:
            ended = number == len(bounds) - 1
            later = _at_end(run, loop, stage) if ended else _stored(folder.replay(number + 1), targets)
        inputs = {"segment": folder.segment(number).fingerprint}
        with artefact.attempt("replay", inputs) as attempt:
            scores, later = _walk(run, loop, stage, number, bounds[number], later)
            adjoints = {f"{t}/{group:05d}": q for t in targets for group, q in enumerate(later[t])}
            write_tensors(attempt, FILE, {SCORES: scores, **adjoints}, {})
    return len(bounds)


def replay_scores(run: Run, stage: int, number: int) -> dict[str, Tensor]:
    """Every target's scores of a segment's selected records, in the order of its ledger."""
    scores = read_tensors(run.folder.stage(stage).replay(number), FILE)[SCORES]
    return dict(zip(run.plan.targets, scores.unbind(1), strict=True))


def _walk(
    run: Run, loop: Loop, stage: int, number: int, steps: range, later: dict[str, Adjoint]
) -> tuple[Tensor, dict[str, Adjoint]]:
    """One segment: forwards, keeping its states, then backwards for each target."""
    to_segment(run, loop, stage, number)
    tape = Tape(loop.model, loop.optimizer, lambda: loop.scale)
    for step in track(steps, f"stage {stage}, repeating segment {number}", len(steps)):
        loop.step(step)
    tape.close()
    _check_repeated(run, loop, stage, number)
    windows, spec = loop.order.windows(), run.plan.replay
    rows: list[Tensor] = []
    for step in track(reversed(steps), f"stage {stage}, replaying segment {number}", len(steps)):
        parts = [Part(partial(_losses, loop, part), part.weights) for part in loop.micro_batches(step)]
        reseed = partial(torch.manual_seed, loop.order.seed(step))
        moment, found = tape.moments.pop(), []
        for name, q in later.items():
            scores, later[name] = step_back(
                loop.model, tape.groups, moment, tape.linearised, parts, q, spec.method, reseed, spec.step
            )
            found.append(scores)
        if any(step in window for window in windows):
            rows.insert(0, torch.stack(found, 1))
    empty = torch.empty(0, len(later), dtype=torch.float64)
    return torch.cat([empty, *rows]), later


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


def _at_end(run: Run, loop: Loop, stage: int) -> dict[str, Adjoint]:
    """Every target's loss gradient at the stage's end, in all parameters."""
    loop.restore(read_checkpoint(end_checkpoint(run, stage)))
    slots = len(linearised(run.plan.optimizer).slots)
    groups = Groups(loop.model, loop.optimizer)
    return {name: groups.adjoint(_gradient(run, loop, name), slots) for name in run.plan.targets}


def _gradient(run: Run, loop: Loop, target: str) -> dict[str, Tensor]:
    """The gradient of a target's mean loss."""
    samples = target_samples(run, target)
    scoring = torch.arange(len(samples))[scoring_rows(run.plan)]
    named = {name: p for name, p in loop.model.named_parameters() if p.requires_grad}
    total = [torch.zeros_like(p) for p in named.values()]
    with evaluating(loop.model):
        for rows in scoring.split(EVALUATION_BATCH):
            loss = loop.task.losses(loop.model, loop.batch(rows, samples)).sum() / len(scoring)
            found = torch.autograd.grad(loss, list(named.values()), materialize_grads=True)
            total = [a + b for a, b in zip(total, found, strict=True)]
    return dict(zip(named, total, strict=True))


def _stored(artefact: Artefact, targets: list[str]) -> dict[str, Adjoint]:
    """The adjoint at the start of a segment that was replayed before."""
    tensors = read_tensors(artefact, FILE)
    return {target: [tensors[n] for n in sorted(tensors) if n.startswith(f"{target}/")] for target in targets}

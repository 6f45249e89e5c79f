"""Our estimates for `benchmarks.lds`, from one recorded training with every parameter recorded."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.small_gpt2 import TextTraining
from secateur.influence.adjoint import step_back
from secateur.influence.bindings import bind_layers
from secateur.influence.coordinate_basis import CoordinateBasis
from secateur.influence.curvature import Fisher
from secateur.influence.hooks import sample_gradients
from secateur.influence.optimizers import UpdateRule
from secateur.influence.recorder import Recorder
from secateur.influence.recursion import Dynamics, walk_segment
from secateur.influence.segment import Segment
from secateur.influence.tape import Tape

SEGMENT = 50  # steps, as in a plan that does not say otherwise; coordinates are chosen on the first


@dataclass
class Record:
    """A recorded training.

    Attributes:
        model: as it is at the end.
        tape: the values that every step read, for replay.
        segments: files of the record, in all coordinates, with one random sign per token for the
            curvature. There are gigabytes of it.
        spans: the coordinates of each block.
        questions: gradient of each question, `questions coordinates`.
        seconds: of processor time that the training took with all this.
    """

    training: TextTraining
    model: torch.nn.Module
    tape: Tape
    update_rule: UpdateRule
    segments: list[Path]
    spans: Sequence[slice]
    questions: Tensor
    seconds: float


def record_training(training: TextTraining, folder: Path) -> Record:
    """Train, and record every parameter in files of a folder."""
    start = time.process_time()
    workload = training.workload
    model = workload.model()
    optimizer = workload.optimizer(model)
    bindings = bind_layers(model)
    first = workload.batches[0]
    bindings.locate(lambda rows: workload.losses(model, first[rows]), len(first))
    basis = CoordinateBasis(bindings.blocks, [torch.arange(b.size) for b in bindings.blocks])
    recorder = Recorder(model, optimizer, bindings, basis)
    tape = Tape(model, optimizer)
    tokens = training.texts.shape[1] - 1
    generator = torch.Generator().manual_seed(0)
    segments = []
    for step, ids in enumerate(workload.batches):
        signs = torch.randint(2, (len(ids), tokens), generator=generator) * 2.0 - 1
        signed = partial(training.signed_losses, model, ids, signs)
        weights = torch.full((len(ids),), 1 / len(ids), dtype=torch.float64)
        recorder.record_fisher(signed, weights, torch.full((len(ids),), float(tokens)))
        workload.step(model, optimizer, step, None, recorder)
        if (step + 1) % SEGMENT == 0 or step + 1 == len(workload.batches):
            segments.append(_write_segment(recorder.take_segment(), folder))
    tape.close()
    recorder.close()
    asked = workload.validation
    losses_of = lambda rows: workload.losses(model, asked[rows])  # noqa: E731
    questions, _ = sample_gradients(losses_of, len(asked), bindings, basis)
    rule, spans = recorder.update_rule, list(basis.spans)
    seconds = time.process_time() - start
    return Record(training, model, tape, rule, segments, spans, questions, seconds)


def replay(record: Record) -> Tensor:
    """Return the effect of every use on each question, by replay: `questions uses`."""
    workload, model, tape = record.training.workload, record.model, record.tape
    parameters = dict(model.named_parameters())
    final = {name: p.detach().clone() for name, p in parameters.items()}
    steps = [tape.steps.pop() for _ in workload.batches]
    rows = []
    for question in workload.validation:
        model.load_state_dict(final, strict=False)
        loss = workload.losses(model, question[None]).sum()
        gradients = torch.autograd.grad(loss, list(parameters.values()))
        named = dict(zip(parameters, gradients, strict=True))
        adjoint = tape.groups.start_adjoint(named, len(tape.update_rule.slots))
        scores = []
        for state, ids in zip(steps, reversed(workload.batches), strict=True):
            parts = [workload.loss_part(ids)]
            found, adjoint = step_back(model, tape.groups, state, tape.update_rule, parts, adjoint)
            scores.append(found)
        rows.append(torch.cat(scores[::-1]))
    model.load_state_dict(final, strict=False)
    return torch.stack(rows)


def pull_back_all(record: Record) -> Tensor:
    """Return the effect of every use on each question, pulled back in all coordinates."""
    return walk_record(record, torch.arange(record.questions.shape[1]), coupled=True)


def embed(record: Record, coefficients: int) -> Tensor:
    """Return the effect of every use by embeddings, as a plan makes them by default.

    Coordinates are those of most energy in the first segment, over the whole model, and blocks are
    not coupled. The question is pulled back, which gives the same products as embeddings.
    """
    energy = _read_segment(record.segments[0]).contributions.square().sum(0)
    places = energy.topk(min(coefficients, len(energy))).indices.sort().values
    return walk_record(record, places, coupled=False)


def walk_record(record: Record, places: Tensor, coupled: bool) -> Tensor:
    """Return the effect of every use on each question, from some coordinates of the record."""
    spans = [slice(0, len(places))]
    if not coupled:
        starts = torch.tensor([span.start for span in record.spans] + [record.spans[-1].stop])
        ends = torch.searchsorted(places, starts).tolist()
        spans = [slice(a, b) for a, b in pairwise(ends) if b > a]
    questions = record.questions[:, places]
    slots = len(record.update_rule.slots)
    query = [torch.nn.functional.pad(questions[:, None, span], (0, 0, 0, slots)) for span in spans]
    found = []
    for path in reversed(record.segments):
        segment = _read_segment(path)
        part = segment if len(places) == segment.size else _select(segment, places)
        dynamics = Dynamics.from_segment(part, record.update_rule, Fisher(part, spans), spans)
        effects, query = walk_segment(dynamics, query)
        found.append(torch.stack(effects).sum(0))
    return torch.cat(found[::-1]).T


def _write_segment(segment: Segment, folder: Path) -> Path:
    path = folder / f"segment-{segment.first_step}.safetensors"
    save_file(segment.tensors(), path, {"first_step": str(segment.first_step)})
    return path


def _read_segment(path: Path) -> Segment:
    with safe_open(path, "pt") as file:
        return Segment(**load_file(path), first_step=int(file.metadata()["first_step"]))


def _select(segment: Segment, places: Tensor) -> Segment:
    """The segment in some coordinates."""
    return replace(
        segment,
        contributions=segment.contributions[:, places],
        gradients=segment.gradients[:, places],
        states=segment.states[..., places],
        groups=segment.groups[places],
        fisher=segment.fisher[:, places],
    )


# Every estimate gives `questions uses`; a sample's score is the sum over its uses.
ESTIMATES: dict[str, Callable[[Record], Tensor]] = {
    "replay": replay,
    "pull-back, all coordinates": pull_back_all,
    "embedding, 2,048 numbers": partial(embed, coefficients=2048),
}


def sum_over_uses(effects: Tensor, batches: Sequence[Tensor], samples: int) -> Tensor:
    """Return each sample's score, `questions samples`, from the effects of its uses."""
    scores = torch.zeros(len(effects), samples, dtype=torch.float64)
    return scores.index_add_(1, torch.cat(list(batches)), effects.double())

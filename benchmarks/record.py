"""A training with every parameter recorded, in files, and the effects of all uses on questions."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from scipy.stats import spearmanr
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.workloads import Workload
from secateur.influence.adjoint import step_back
from secateur.influence.bindings import bind_layers
from secateur.influence.coordinate_basis import CoordinateBasis
from secateur.influence.curvature import Curvature
from secateur.influence.hooks import sample_gradients
from secateur.influence.optimizers import UpdateRule
from secateur.influence.recorder import Recorder
from secateur.influence.recursion import Dynamics, walk_segment
from secateur.influence.segment import Segment
from secateur.influence.tape import StepState, Tape

SEGMENT = 50  # steps, as in a plan that does not say otherwise
SIGNS = "signs"  # name of the curvature's gradients with a random sign per token
CurvatureOf = Callable[[Segment, list[slice]], Curvature]


@dataclass
class Record:
    """A recorded training of a language model.

    Attributes:
        model: as it is at the end.
        tape: the values that every step read, for replay.
        segments: files of the record, in all coordinates. There are gigabytes of it.
        spans: the coordinates of each block.
        asked: ids of the questions' texts.
        questions: gradient of each question, `questions coordinates`.
        seconds: of processor time that the training took with all this.
    """

    workload: Workload
    model: nn.Module
    tape: Tape
    update_rule: UpdateRule
    segments: list[Path]
    spans: Sequence[slice]
    asked: Tensor
    questions: Tensor
    seconds: float


def record_training(workload: Workload, questions: int, draws: int, folder: Path) -> Record:
    """Train, and record every parameter in files of a folder.

    Args:
        questions: how many of the first validation samples are asked about.
        draws: how often labels are drawn from the model for the curvature. Once more, its gradients
            have random signs.
    """
    start = time.process_time()
    model = workload.model()
    optimizer = workload.optimizer(model)
    bindings = bind_layers(model)
    first = workload.batches[0]
    bindings.locate(lambda rows: workload.losses(model, first[rows]), len(first))
    basis = CoordinateBasis(bindings.blocks, [torch.arange(b.size) for b in bindings.blocks])
    recorder = Recorder(model, optimizer, bindings, basis)
    tape = Tape(model, optimizer)
    generator = torch.Generator().manual_seed(0)
    names = [*map(str, range(draws)), SIGNS]
    segments = []
    for step, ids in enumerate(workload.batches):
        x, y = workload.data(ids)
        weights = torch.full((len(ids),), 1 / len(ids), dtype=torch.float64)
        factors = torch.full((len(ids),), float(y.shape[1]))
        for losses_of in random_losses(model, x, y, draws, generator):
            recorder.record_fisher(losses_of, weights, factors)
        workload.step(model, optimizer, step, None, recorder)
        if (step + 1) % SEGMENT == 0 or step + 1 == len(workload.batches):
            segments.append(_write_segment(recorder.take_segment(), names, len(ids), folder))
    tape.close()
    recorder.close()
    asked = workload.validation[:questions]
    losses_of = lambda rows: workload.losses(model, asked[rows])  # noqa: E731
    gradients, _ = sample_gradients(losses_of, len(asked), bindings, basis)
    rule, spans = recorder.update_rule, list(basis.spans)
    seconds = time.process_time() - start
    return Record(workload, model, tape, rule, segments, spans, asked, gradients, seconds)


def random_losses(
    model: nn.Module, x: Tensor, y: Tensor, draws: int, generator: torch.Generator
) -> Iterator[Callable[[Tensor], Tensor]]:
    """Losses of a batch with labels drawn from the model, then with a random sign per token."""
    ones = torch.ones(y.shape)
    for _ in range(draws):
        with torch.no_grad():
            logits = _logits(model, x)
        drawn = logits.softmax(-1).flatten(0, 1).multinomial(1, generator=generator).view_as(y)
        yield partial(_weighted_losses, model, x, drawn, ones)
    signs = torch.randint(2, y.shape, generator=generator) * 2.0 - 1
    yield partial(_weighted_losses, model, x, y, signs)


def _weighted_losses(
    model: nn.Module, x: Tensor, y: Tensor, factors: Tensor, rows: Tensor
) -> Tensor:
    logits = _logits(model, x[rows]).transpose(1, 2)
    return (functional.cross_entropy(logits, y[rows], reduction="none") * factors[rows]).mean(1)


def _logits(model: nn.Module, x: Tensor) -> Tensor:
    output = model(x)
    logits: Tensor = getattr(output, "logits", output)
    return logits


def replay(record: Record) -> Tensor:
    """Return the effect of every use on each question, by replay: `questions uses`."""
    workload, model, tape = record.workload, record.model, record.tape
    final = {name: p.detach().clone() for name, p in model.named_parameters()}
    steps = [tape.steps.pop() for _ in workload.batches]
    found = []
    for question in record.asked:
        model.load_state_dict(final, strict=False)
        loss = workload.losses(model, question[None]).sum()
        found.append(replay_loss(workload, model, tape, steps, loss))
    model.load_state_dict(final, strict=False)
    return torch.stack(found)


def replay_loss(
    workload: Workload, model: nn.Module, tape: Tape, steps: list[StepState], loss: Tensor
) -> Tensor:
    """Return the effect of every use on a loss at the end of training: `uses`.

    Args:
        model: as it is at the end. It is taken back to the start.
        steps: of the tape, the last first.
        loss: of the model, with its graph.
    """
    parameters = dict(model.named_parameters())
    gradients = torch.autograd.grad(loss, list(parameters.values()))
    named = dict(zip(parameters, gradients, strict=True))
    adjoint = tape.groups.start_adjoint(named, len(tape.update_rule.slots))
    found = []
    for state, ids in zip(steps, reversed(workload.batches), strict=True):
        parts = [workload.loss_part(ids)]
        effects, adjoint = step_back(model, tape.groups, state, tape.update_rule, parts, adjoint)
        found.append(effects)
    return torch.cat(found[::-1])


def agreement(scores: Tensor, truth: Tensor) -> float:
    """Return Spearman's correlation of two estimates, the median of the questions."""
    pairs = zip(scores, truth, strict=True)
    return statistics.median(float(spearmanr(a, b).statistic) for a, b in pairs)


def walk_record(
    record: Record,
    gradients: Tensor,
    curvature: CurvatureOf,
    draws: Sequence[str],
    places: Tensor | None,
    coupled: bool,
    texts: int | None = None,
) -> Tensor:
    """Return the estimated effect of every use on each question, `questions uses`.

    A question is pulled back through the record, which gives the same products as embeddings.

    Args:
        gradients: of the questions, in the coordinates.
        draws: which of the curvature's gradients count.
        places: the coordinates; all if None.
        coupled: whether blocks are coupled.
        texts: how many texts of each step have such gradients; all if None.
    """
    spans = [slice(0, gradients.shape[1])]
    if not coupled:
        starts = torch.tensor([*(span.start for span in record.spans), record.spans[-1].stop])
        ends = starts if places is None else torch.searchsorted(places, starts)
        spans = [slice(a, b) for a, b in pairwise(ends.tolist()) if b > a]
    slots = len(record.update_rule.slots)
    query = [functional.pad(gradients[:, None, span], (0, 0, 0, slots)) for span in spans]
    found = []
    for path in reversed(record.segments):
        part = _read_segment(path, draws, places)
        if texts is not None:
            part = _keep_texts(part, texts, len(record.workload.batches[0]))
        dynamics = Dynamics.from_segment(part, record.update_rule, curvature(part, spans), spans)
        effects, query = walk_segment(dynamics, query)
        found.append(torch.stack(effects).sum(0))
    return torch.cat(found[::-1]).T


def read_gradients(record: Record, places: Tensor | None = None) -> Tensor:
    """Return the gradients of all uses, `uses coordinates`."""
    return torch.cat([read_segment_gradients(path, places) for path in record.segments])


def read_segment_gradients(path: Path, places: Tensor | None = None) -> Tensor:
    """Return the gradients of a segment's uses, `uses coordinates`."""
    with safe_open(path, "pt") as file:
        gradients: Tensor = file.get_tensor("contributions")
    return gradients if places is None else gradients[:, places]


def _write_segment(segment: Segment, names: list[str], batch: int, folder: Path) -> Path:
    """Write the gradients of the curvature by name. Each step has them name by name."""
    tensors = segment.tensors()
    numbers = torch.arange(len(segment.fisher)) % (batch * len(names)) // batch
    for number, name in enumerate(names):
        tensors[f"fisher-{name}"] = tensors["fisher"][numbers == number]
    for field in ("fisher_steps", "fisher_weights"):
        tensors[field] = tensors[field][numbers == 0]
    del tensors["fisher"]
    path = folder / f"segment-{segment.first_step}.safetensors"
    save_file(tensors, path, {"first_step": str(segment.first_step)})
    return path


def _read_segment(path: Path, draws: Sequence[str], places: Tensor | None) -> Segment:
    with safe_open(path, "pt") as file:
        fields = {
            name: file.get_tensor(name)
            for name in file.keys()  # noqa: SIM118
            if not name.startswith("fisher-")
        }
        drawn = [file.get_tensor(f"fisher-{name}") for name in draws]
        first_step = int(file.metadata()["first_step"])
    steps, weights = fields.pop("fisher_steps"), fields.pop("fisher_weights")
    segment = Segment(
        **fields,
        first_step=first_step,
        fisher=torch.cat(drawn) if drawn else fields["contributions"][:0],
        fisher_steps=steps.repeat(len(draws)),
        fisher_weights=weights.repeat(len(draws)) * len(draws),
    )
    return segment if places is None else _select(segment, places)


def _keep_texts(segment: Segment, texts: int, batch: int) -> Segment:
    """The segment with the curvature's gradients of a step's first texts, which stand for all."""
    kept = torch.arange(len(segment.fisher)) % batch < texts
    return replace(
        segment,
        fisher=segment.fisher[kept],
        fisher_steps=segment.fisher_steps[kept],
        fisher_weights=segment.fisher_weights[kept] * (texts / batch),
    )


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

"""How well answers about single texts agree with replay, on workload F, a byte-level transformer.

`python -m benchmarks.questions [--seeds 5] [--json FILE]` trains once per seed with every parameter
recorded, in float32. Eight validation texts are asked about. For each, replay of the training gives
the effect of leaving out each of the 3,200 uses. Rows are estimates of the same, by a question that
is pulled back through the record. Columns are Spearman's correlation with replay (the median of the
eight), the share of replay's 50 most helpful uses that are among the estimate's best 1,000, and the
share of the question's squared gradient that the coordinates hold: the median over seeds (least to
greatest).
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch
from scipy.stats import spearmanr
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.larger import make_text
from benchmarks.timing import format_spread
from benchmarks.workloads import Workload
from secateur.influence.adjoint import step_back
from secateur.influence.bindings import bind_layers
from secateur.influence.coordinate_basis import CoordinateBasis, share_coefficients
from secateur.influence.curvature import Curvature, EmpiricalFisher, Fisher, NoCurvature
from secateur.influence.hooks import sample_gradients
from secateur.influence.optimizers import UpdateRule
from secateur.influence.recorder import Recorder
from secateur.influence.recursion import Dynamics, walk_segment
from secateur.influence.segment import Segment
from secateur.influence.tape import Tape

QUESTIONS, SEGMENT, BATCH, POSITIONS = 8, 50, 16, 64
DRAWS = 2  # with labels drawn from the model; one more has random signs
FIRST, BEST = 50, 1000


@dataclass
class Training:
    """A recorded training, the gradients asked about, and the true effects.

    Attributes:
        segments: the record, in all coordinates. Their Fisher rows are, for each step, `DRAWS`
            batches with drawn labels and one with random signs.
        spans: the coordinates of each block.
        questions: gradient of each text asked about.
        truth: by replay, the effect of every use on each.
    """

    update_rule: UpdateRule
    segments: list[Segment]
    spans: list[slice]
    questions: Tensor
    truth: Tensor


def train(workload: Workload) -> Training:
    """Train, record everything, and replay the training for every question."""
    model = workload.model()
    optimizer = workload.optimizer(model)
    bindings = bind_layers(model)
    bindings.locate(partial(_losses, workload, model, workload.batches[0]), BATCH)
    basis = CoordinateBasis(bindings.blocks, [torch.arange(b.size) for b in bindings.blocks])
    recorder = Recorder(model, optimizer, bindings, basis)
    tape = Tape(model, optimizer)
    torch.manual_seed(0)
    segments = []
    for step, ids in enumerate(workload.batches):
        for losses_of in _random_losses(workload, model, ids):
            weights = torch.full((BATCH,), 1 / BATCH, dtype=torch.float64)
            recorder.record_fisher(losses_of, weights, torch.full((BATCH,), float(POSITIONS)))
        workload.step(model, optimizer, step, None, recorder)
        if (step + 1) % SEGMENT == 0:
            segments.append(recorder.take_segment())
    tape.close()
    recorder.close()
    asked = workload.validation[:QUESTIONS]
    losses_of = partial(_losses, workload, model, asked)
    questions, _ = sample_gradients(losses_of, QUESTIONS, bindings, basis)
    truth = torch.stack(list(_replay(workload, model, tape, losses_of)))
    return Training(recorder.update_rule, segments, list(basis.spans), questions, truth)


def _losses(workload: Workload, model: nn.Module, ids: Tensor, rows: Tensor) -> Tensor:
    return workload.losses(model, ids[rows])


def _random_losses(
    workload: Workload, model: nn.Module, ids: Tensor
) -> Iterator[Callable[[Tensor], Tensor]]:
    """Losses of a batch with labels drawn from the model, then with a random sign per position."""
    x, y = workload.data(ids)
    with torch.no_grad():
        logits = model(x)
    ones = torch.ones(y.shape)
    for _ in range(DRAWS):
        drawn = torch.distributions.Categorical(logits=logits).sample()
        yield partial(_weighted_losses, model, x, drawn, ones)
    yield partial(_weighted_losses, model, x, y, torch.randint(2, y.shape) * 2.0 - 1)


def _weighted_losses(
    model: nn.Module, x: Tensor, y: Tensor, factors: Tensor, rows: Tensor
) -> Tensor:
    logits = model(x[rows]).transpose(1, 2)
    return (functional.cross_entropy(logits, y[rows], reduction="none") * factors[rows]).mean(1)


def _replay(
    workload: Workload, model: nn.Module, tape: Tape, losses_of: Callable[[Tensor], Tensor]
) -> Iterator[Tensor]:
    """The effect of every use on each question."""
    parameters = dict(model.named_parameters())
    final = {name: p.detach().clone() for name, p in parameters.items()}
    steps = [tape.steps.pop() for _ in workload.batches]
    for question in range(QUESTIONS):
        model.load_state_dict(final, strict=False)
        loss = losses_of(torch.tensor([question])).sum()
        gradients = torch.autograd.grad(loss, list(parameters.values()))
        named = dict(zip(parameters, gradients, strict=True))
        adjoint = tape.groups.start_adjoint(named, len(tape.update_rule.slots))
        scores = []
        for state, ids in zip(steps, reversed(workload.batches), strict=True):
            parts = [workload.loss_part(ids)]
            found, adjoint = step_back(model, tape.groups, state, tape.update_rule, parts, adjoint)
            scores.append(found)
        yield torch.cat(scores[::-1])


def answer(
    training: Training,
    curvature: Callable[[Segment, list[slice]], Curvature],
    draws: range,
    places: Tensor | None,
    coupled: bool = True,
) -> Tensor:
    """Return the estimated effect of every use on each question, `questions uses`.

    Args:
        draws: which of a step's batches of Fisher rows count.
        places: the coordinates; all if None.
        coupled: whether blocks are coupled.
    """
    gradients = training.questions if places is None else training.questions[:, places]
    spans = [slice(0, gradients.shape[1])]
    if not coupled:
        assert places is not None
        counts = [int(((places >= s.start) & (places < s.stop)).sum()) for s in training.spans]
        ends = torch.tensor([0, *counts]).cumsum(0).tolist()
        spans = [slice(a, b) for a, b in pairwise(ends) if b > a]
    slots = len(training.update_rule.slots) + 1
    query = []
    for span in spans:
        start = gradients.new_zeros(QUESTIONS, slots, span.stop - span.start)
        start[:, 0] = gradients[:, span]
        query.append(start)
    found = []
    for segment in reversed(training.segments):
        part = _select(segment, draws, places)
        dynamics = Dynamics.from_segment(part, training.update_rule, curvature(part, spans), spans)
        effects, query = walk_segment(dynamics, query)
        found.append(torch.stack(effects).sum(0))
    return torch.cat(found[::-1]).T


def _select(segment: Segment, draws: range, places: Tensor | None) -> Segment:
    """The segment in some coordinates, with some of its Fisher rows."""
    numbers = torch.arange(len(segment.fisher)) % (BATCH * (DRAWS + 1)) // BATCH
    chosen = torch.isin(numbers, torch.tensor(list(draws), dtype=torch.int64))
    picked = replace(
        segment,
        fisher=segment.fisher[chosen],
        fisher_steps=segment.fisher_steps[chosen],
        fisher_weights=segment.fisher_weights[chosen] * len(draws),
    )
    if places is None:
        return picked
    return replace(
        picked,
        contributions=picked.contributions[:, places],
        gradients=picked.gradients[:, places],
        states=picked.states[..., places],
        groups=picked.groups[places],
        fisher=picked.fisher[:, places],
    )


def choose(training: Training, steps: int, count: int, equal: bool) -> Tensor:
    """Return the coordinates of most energy in the first steps.

    Args:
        equal: whether every block gets as many, or the energy alone decides.
    """
    rows = torch.cat([s.contributions for s in training.segments])[: steps * BATCH]
    energy = rows.square().sum(0)
    if not equal:
        return energy.topk(count).indices.sort().values
    shares = share_coefficients([s.stop - s.start for s in training.spans], count)
    pairs = zip(training.spans, shares, strict=True)
    return torch.cat([energy[s].topk(n).indices.sort().values + s.start for s, n in pairs])


NONE, DRAWN, TWICE, SIGNS = range(0), range(1), range(DRAWS), range(DRAWS, DRAWS + 1)
Row = Callable[[Training], tuple[Tensor, Tensor | None]]


def _row(
    curvature: Callable[[Segment, list[slice]], Curvature],
    draws: range,
    choice: tuple[int, int, bool] | None = None,
    coupled: bool = True,
) -> Row:
    def run(training: Training) -> tuple[Tensor, Tensor | None]:
        places = None if choice is None else choose(training, *choice)
        return answer(training, curvature, draws, places, coupled), places

    return run


ROWS: dict[str, Row] = {
    "all, no curvature": _row(NoCurvature, NONE),
    "all, empirical Fisher of texts": _row(EmpiricalFisher, NONE),
    "all, random signs": _row(Fisher, SIGNS),
    "all, labels drawn": _row(Fisher, DRAWN),
    "all, labels drawn twice": _row(Fisher, TWICE),
    **{
        f"{count:,}, {name}": _row(curvature, draws, (steps, count, equal), coupled)
        for count in (2048, 8192)
        for name, curvature, draws, steps, equal, coupled in (
            ("10 steps, equal, texts, by block", EmpiricalFisher, NONE, 10, True, False),
            ("10 steps, equal, signs, by block", Fisher, SIGNS, 10, True, False),
            ("10 steps, equal, signs", Fisher, SIGNS, 10, True, True),
            ("10 steps, by energy, signs", Fisher, SIGNS, 10, False, True),
            ("50 steps, by energy, signs", Fisher, SIGNS, 50, False, True),
            ("50 steps, by energy, signs, by block", Fisher, SIGNS, 50, False, False),
            ("50 steps, by energy, drawn twice", Fisher, TWICE, 50, False, True),
            ("all steps, by energy, drawn twice", Fisher, TWICE, 200, False, True),
        )
    },
}


def measure(training: Training, row: Row) -> tuple[float, float, float]:
    """Return a row's correlation, share of the first uses found, and share of the gradient."""
    scores, places = row(training)
    pairs = list(zip(scores, training.truth, strict=True))
    correlation = statistics.median(float(spearmanr(a, b).statistic) for a, b in pairs)
    found = statistics.median(
        float(torch.isin(b.topk(FIRST).indices, a.topk(BEST).indices).float().mean())
        for a, b in pairs
    )
    squares = training.questions.square()
    held = (squares if places is None else squares[:, places]).sum(1) / squares.sum(1)
    return correlation, found, float(held.median())


def _make_workload(seed: int) -> Workload:
    """Workload F in float32, which halves its memory."""
    workload = make_text(seed)
    return replace(
        workload,
        model=lambda: workload.model().float(),
        losses=lambda model, ids: workload.losses(model, ids).double(),
    )


def main() -> None:
    """Print one line per estimate."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    results: dict[str, list[tuple[float, float, float]]] = {name: [] for name in ROWS}
    for seed in range(arguments.seeds):
        training = train(_make_workload(seed))
        for name, row in ROWS.items():
            results[name].append(measure(training, row))
            print(seed, name, *(f"{value:.3f}" for value in results[name][-1]), flush=True)
    print(f"{'coordinates, curvature':48}{'Spearman':24}{'50 in best 1,000':24}gradient held")
    for name, values in results.items():
        columns = [format_spread([v[i] for v in values]) for i in range(3)]
        print(f"{name:48}" + "".join(f"{column:24}" for column in columns))
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""How well answers about single texts agree with replay, on workload F, a byte-level transformer.

`python -m benchmarks.questions [--seeds 5] [--json FILE]` trains once per seed with every parameter
recorded, in float32. Eight validation texts are asked about. For each, replay of the training gives
the effect of leaving out each of the 3,200 uses. Rows are estimates of the same, by a question that
is pulled back through the record, in all coordinates, in those of most energy, or in the principal
directions of the recorded gradients. Columns are Spearman's correlation with replay (the median of
the eight), the share of replay's 50 most helpful uses that are among the estimate's best 1,000 and
best 2,000, and the share of the question's squared gradient that is held: the median over seeds
(least to greatest).
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
from secateur.influence.principal_directions import principal_directions
from secateur.influence.recorder import Recorder
from secateur.influence.recursion import Dynamics, walk_segment
from secateur.influence.segment import Segment
from secateur.influence.tape import Tape

QUESTIONS, SEGMENT, BATCH, POSITIONS = 8, 50, 16, 64
DRAWS = 4  # with labels drawn from the model; one more has random signs
FIRST, BEST = 50, (1000, 2000)


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
    gradients: Tensor,
    curvature: Callable[[Segment, list[slice]], Curvature],
    draws: range,
    places: Tensor | None,
    coupled: bool = True,
) -> Tensor:
    """Return the estimated effect of every use on each question, `questions uses`.

    Args:
        gradients: of the questions, in the coordinates.
        draws: which of a step's batches of Fisher rows count.
        places: the coordinates; all if None.
        coupled: whether blocks are coupled.
    """
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


def hold(questions: Tensor, directions: Tensor) -> Tensor:
    """The part of questions that lies in orthonormal directions, `questions p`."""
    return (questions @ directions) @ directions.T


NONE, DRAWN, TWICE = range(0), range(1), range(2)
ALL_DRAWS, SIGNS = range(DRAWS), range(DRAWS, DRAWS + 1)
# Scores, and the part of each question's gradient that is held.
Row = Callable[[Training], tuple[Tensor, Tensor]]


def _row(
    curvature: Callable[[Segment, list[slice]], Curvature],
    draws: range,
    choice: tuple[int, int, bool] | None = None,
    coupled: bool = True,
    directions: int | None = None,
) -> Row:
    """A row's estimate: the curvature, and which coordinates of the record it has.

    Args:
        curvature, draws, coupled: as in `answer`.
        choice: steps, number and equality of `choose`; all coordinates if None.
        directions: how many numbers an embedding has; as many as coordinates if None. Embeddings in
            such numbers score a question as its part in the directions is scored.
    """

    def run(training: Training) -> tuple[Tensor, Tensor]:
        places = None if choice is None else choose(training, *choice)
        held = training.questions if places is None else training.questions[:, places]
        if directions is not None:
            gradients = torch.cat([s.contributions for s in training.segments])
            gradients = gradients if places is None else gradients[:, places]
            held = hold(held, principal_directions(gradients, directions))
        return answer(training, held, curvature, draws, places, coupled), held

    return run


ROWS: dict[str, Row] = {
    "all, no curvature": _row(NoCurvature, NONE),
    "all, empirical Fisher of texts": _row(EmpiricalFisher, NONE),
    "all, signs": _row(Fisher, SIGNS),
    "all, drawn": _row(Fisher, DRAWN),
    "all, drawn twice": _row(Fisher, TWICE),
    "all, drawn 4 times": _row(Fisher, ALL_DRAWS),
    "2,048: 10 steps, equal, texts, by block": _row(
        EmpiricalFisher, NONE, (10, 2048, True), coupled=False
    ),
    "2,048: 50 steps, signs, by block": _row(Fisher, SIGNS, (50, 2048, False), coupled=False),
    "8,192: 50 steps, signs, by block": _row(Fisher, SIGNS, (50, 8192, False), coupled=False),
    "8,192: 50 steps, drawn 4 times": _row(Fisher, ALL_DRAWS, (50, 8192, False)),
    "32,768 in 2,048 directions, signs": _row(Fisher, SIGNS, (50, 32768, False), directions=2048),
    "32,768 in 2,048, drawn 4 times": _row(Fisher, ALL_DRAWS, (50, 32768, False), directions=2048),
    "all in 512 directions, signs": _row(Fisher, SIGNS, directions=512),
    "all in 2,048 directions, signs": _row(Fisher, SIGNS, directions=2048),
    "all in 512 directions, drawn 4 times": _row(Fisher, ALL_DRAWS, directions=512),
    "all in 2,048 directions, drawn 4 times": _row(Fisher, ALL_DRAWS, directions=2048),
}


def measure(training: Training, row: Row) -> tuple[float, ...]:
    """Return a row's correlation, shares of the first uses found, and share of the gradient."""
    scores, held = row(training)
    pairs = list(zip(scores, training.truth, strict=True))
    correlation = statistics.median(float(spearmanr(a, b).statistic) for a, b in pairs)
    found = [
        statistics.median(
            float(torch.isin(b.topk(FIRST).indices, a.topk(best).indices).float().mean())
            for a, b in pairs
        )
        for best in BEST
    ]
    share = held.square().sum(1) / training.questions.square().sum(1)
    return correlation, *found, float(share.median())


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
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    results: dict[str, list[tuple[float, ...]]] = {name: [] for name in ROWS}
    for seed in range(arguments.first, arguments.first + arguments.seeds):
        training = train(_make_workload(seed))
        for name, row in ROWS.items():
            results[name].append(measure(training, row))
            print(seed, name, *(f"{value:.3f}" for value in results[name][-1]), flush=True)
    names = ["Spearman", *(f"50 in best {best:,}" for best in BEST), "gradient held"]
    print(f"{'coordinates, curvature':48}" + "".join(f"{name:24}" for name in names))
    for name, values in results.items():
        columns = [format_spread([v[i] for v in values]) for i in range(len(names))]
        print(f"{name:48}" + "".join(f"{column:24}" for column in columns))
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()

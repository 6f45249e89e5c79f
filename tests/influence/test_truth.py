"""Embeddings with the exact Hessian against derivatives of training with other weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from secateur.influence.bindings import bind_layers
from secateur.influence.curvature import Fisher, Hessian
from secateur.influence.hessian import compute_hessian
from secateur.influence.recorder import Recorder
from secateur.influence.recursion import Dynamics, identity_transition, walk_segment
from secateur.influence.segment import Segment
from tests.influence.oracle import everything

STEPS = 7
BATCH = 5
Make = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]

OPTIMIZERS: dict[str, Make] = {
    "sgd": lambda p: torch.optim.SGD(p, 0.3, weight_decay=0.02),
    "momentum": lambda p: torch.optim.SGD(p, 0.2, momentum=0.8, nesterov=True, weight_decay=0.02),
    "adamw": lambda p: torch.optim.AdamW(p, 0.02, betas=(0.9, 0.95), weight_decay=0.1),
    "adam": lambda p: torch.optim.Adam(p, 0.02, eps=1e-3, weight_decay=0.1),
    "amsgrad": lambda p: torch.optim.AdamW(p, 0.02, betas=(0.5, 0.6), eps=1e-3, amsgrad=True),
    "nadam": lambda p: torch.optim.NAdam(p, 0.02, eps=1e-3, weight_decay=0.1),
    # The sixth step is the first that is rectified.
    "radam": lambda p: torch.optim.RAdam(p, 0.02, betas=(0.8, 0.99), eps=1e-3, weight_decay=0.1),
    "adagrad": lambda p: torch.optim.Adagrad(
        p, 0.02, lr_decay=0.1, initial_accumulator_value=0.01, weight_decay=0.1
    ),
    "centered": lambda p: torch.optim.RMSprop(p, 0.02, alpha=0.5, eps=1e-3, centered=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 0.02, momentum=0.5, eps=1e-3, weight_decay=0.1),
}


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.LayerNorm(3), nn.Linear(3, 3)).double()


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(STEPS, BATCH, 4, generator=generator, dtype=torch.float64)
    return x, torch.randint(3, (STEPS, BATCH), generator=generator)


def train(
    make: Make, removed: tuple[int, int, float] | None = None, clip: float | None = None
) -> Tensor:
    """Return the parameters at the end, with one sample of one step weighted less by a share."""
    model = network()
    x, y = data()
    optimizer = make(model.parameters())
    scales = _clips(make, clip) if clip else [1.0] * STEPS
    for step in range(STEPS):
        weights = torch.full((BATCH,), 1 / BATCH, dtype=torch.float64)
        if removed and removed[0] == step:
            weights[removed[1]] *= 1 - removed[2]
        optimizer.zero_grad()
        (functional.cross_entropy(model(x[step]), y[step], reduction="none") @ weights).backward()
        for parameter in model.parameters():
            assert parameter.grad is not None
            parameter.grad.mul_(scales[step])
        optimizer.step()
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def _clips(make: Make, clip: float) -> list[float]:
    """Return the factors of clipping in the run itself.

    A removal keeps them, because clipping is treated as a scale.
    """
    segment, _ = record(make, clip)
    return segment.scales.tolist()


def record(
    make: Make, clip: float | None = None, fisher: Tensor | None = None
) -> tuple[Segment, Recorder]:
    model = network()
    x, y = data()
    optimizer = make(model.parameters())
    bindings = bind_layers(model)
    basis = everything(bindings)
    recorder = Recorder(model, optimizer, bindings, basis)
    for step in range(STEPS):
        loss = lambda step=step: functional.cross_entropy(model(x[step]), y[step])  # noqa: E731
        recorder.record_hessian(compute_hessian([loss], model, basis, [slice(0, basis.size)]))
        if fisher is not None:
            weights = torch.full((BATCH,), 1 / BATCH, dtype=torch.float64)
            losses_of = partial(sampled_losses, model, x[step], y[step])
            recorder.record_fisher(losses_of, weights, fisher)
        optimizer.zero_grad()
        with recorder.batch(torch.arange(BATCH)):
            loss().backward()
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
    return recorder.take_segment(), recorder


def sampled_losses(model: nn.Module, x: Tensor, y: Tensor, rows: Tensor) -> Tensor:
    """Return losses with other labels, in place of sampled ones."""
    return functional.cross_entropy(model(x[rows]), (y[rows] + 1) % 3, reduction="none")


def in_model_order(embeddings: Tensor, recorder: Recorder) -> Tensor:
    """Return rows of coefficients as rows of the model's parameters, in the model's order."""
    names = [n for n, _ in network().named_parameters()]
    rows = [recorder.basis.lift_to_tensors(row) for row in embeddings]
    return torch.stack([torch.cat([row[n].flatten() for n in names]) for row in rows])


@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_embeddings_are_derivatives_of_training(name: str, clip: float | None) -> None:
    make = OPTIMIZERS[name]
    segment, recorder = record(make, clip)
    spans = [slice(0, segment.size)]
    dynamics = Dynamics.from_segment(segment, recorder.update_rule, Hessian(segment, spans), spans)
    (embeddings,), _ = walk_segment(
        dynamics, identity_transition(spans, 1 + len(recorder.update_rule.slots), torch.float64)
    )
    actual = in_model_order(embeddings[:, : segment.size], recorder)
    eps = 1e-5
    for step, place in ((0, 1), (1, 0), (3, 4), (STEPS - 1, 2)):
        up, down = (train(make, (step, place, sign * eps), clip) for sign in (1, -1))
        expected = (up - down) / (2 * eps)
        distance = (actual[step * BATCH + place] - expected).norm() / expected.norm()
        assert distance < 1e-6, (step, place)


FAMILIES = {
    "norms": lambda: (
        nn.Sequential(
            nn.Linear(4, 6), nn.GroupNorm(2, 6), nn.GELU(), nn.RMSNorm(6), nn.Linear(6, 3)
        ),
        None,
    ),
    "convolution": lambda: (
        nn.Sequential(
            nn.Unflatten(1, (1, 2, 2)),
            nn.Conv2d(1, 3, 2, padding=1),
            nn.Tanh(),
            nn.Flatten(),
            nn.Linear(27, 3),
        ),
        None,
    ),
    "embedding": lambda: (
        nn.Sequential(nn.Embedding(5, 3), nn.Tanh(), nn.Flatten(), nn.Linear(12, 3)),
        5,
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_hessian_is_autograds(family: str) -> None:
    torch.manual_seed(0)
    model, vocabulary = FAMILIES[family]()
    model = model.double()
    x = torch.randint(vocabulary, (6, 4)) if vocabulary else torch.randn(6, 4, dtype=torch.float64)
    y = torch.randint(3, (6,))
    basis = everything(bind_layers(model))
    named = dict(model.named_parameters())

    def loss(coefficients: Tensor) -> Tensor:
        return functional.cross_entropy(
            torch.func.functional_call(model, basis.lift_to_tensors(coefficients), (x,)), y
        )

    expected = torch.autograd.functional.hessian(
        loss, basis.project_tensors({n: p.detach() for n, p in named.items()})
    )
    whole = [slice(0, basis.size)]
    halves = [
        lambda: functional.cross_entropy(model(x), y) * 0.25,
        lambda: functional.cross_entropy(model(x), y) * 0.75,
    ]
    torch.testing.assert_close(
        compute_hessian(halves, model, basis, whole).view(expected.shape), expected
    )
    blocks = compute_hessian(
        [lambda: functional.cross_entropy(model(x), y)], model, basis, basis.spans
    )
    torch.testing.assert_close(blocks, torch.cat([expected[s, s].flatten() for s in basis.spans]))


def test_the_fisher_is_the_mean_over_steps_of_weighted_outer_products() -> None:
    factors = torch.arange(1.0, BATCH + 1, dtype=torch.float64)
    segment, recorder = record(OPTIMIZERS["sgd"], clip=0.5, fisher=factors)
    model = network()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    x, y = data()
    expected = torch.zeros(segment.size, segment.size, dtype=torch.float64)
    for step in range(STEPS):
        for place in range(BATCH):
            model.zero_grad()
            rows = slice(place, place + 1)
            functional.cross_entropy(model(x[step, rows]), (y[step, rows] + 1) % 3).backward()
            row = recorder.basis.project_tensors(
                {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
            )
            share = factors[place] / BATCH * segment.scales[step] / STEPS
            expected += torch.outer(row, row) * share
        model.zero_grad()
        functional.cross_entropy(model(x[step]), y[step]).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
    a = torch.randn(4, segment.size, dtype=torch.float64)
    span = slice(0, segment.size)
    for step in (0, STEPS - 1):
        actual = Fisher(segment, [span]).product(step, span, a, a)
        torch.testing.assert_close(actual, a @ expected)
    # With fewer gradients than coefficients no matrix is formed.
    first = slice(0, 2)
    few = replace(
        segment,
        fisher=segment.fisher[first],
        fisher_steps=segment.fisher_steps[first],
        fisher_weights=segment.fisher_weights[first],
    )
    matrix = torch.zeros(segment.size, segment.size, dtype=torch.float64)
    for row, weight in zip(few.fisher, few.fisher_weights, strict=True):
        matrix += torch.outer(row, row) / weight / STEPS
    torch.testing.assert_close(Fisher(few, [span]).product(0, span, a, a), a @ matrix)

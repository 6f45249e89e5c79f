"""Baselines, against softmax minus one-hot, autograd one sample at a time, and explicit sums."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from examples.text.model import Transformer
from secateur.influence.baselines import gradient_norms, tracin_scores
from secateur.influence.bindings import bind_layers
from secateur.influence.recorder import Recorder
from secateur.influence.segment import Segment
from tests.influence.oracle import everything, one_by_one

Make = Callable[[], tuple[nn.Module, Tensor, Tensor]]
WEIGHTS = torch.tensor([1.0, 4, 2, 3, 5, 1], dtype=torch.float64) / 16


def classifier() -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    return model, torch.randn(6, 5).double(), torch.randint(3, (6,))


def language() -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    ids = torch.randint(256, (6, 9))
    return Transformer(width=8, heads=2, layers=1, context=8).double(), ids[:, :-1], ids[:, 1:]


def losses(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    logits = model(x)
    if y.dim() == 1:
        return functional.cross_entropy(logits, y, reduction="none")
    return (
        functional.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="none")
        .view(y.shape)
        .mean(1)
    )


def record(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    parts: int = 1,
    clip: float | None = None,
    steps: int = 1,
) -> Segment:
    """Record some steps on the same batch, at a falling learning rate."""
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    bindings = bind_layers(model)
    recorder = Recorder(model, optimizer, bindings, everything(bindings))
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 0.1 / (1 + step)
        optimizer.zero_grad()
        for rows in torch.arange(6).chunk(parts):
            with recorder.batch(rows, WEIGHTS[rows]):
                (losses(model, x[rows], y[rows]) * WEIGHTS[rows]).sum().backward()
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
    return recorder.take_segment()


@pytest.mark.parametrize("make", [classifier, language])
@pytest.mark.parametrize(("parts", "clip"), [(1, None), (3, 0.01)])
def test_errors_are_softmax_minus_onehot(make: Make, parts: int, clip: float | None) -> None:
    model, x, y = make()
    with torch.no_grad():
        logits = model(x)
    error = logits.softmax(-1) - functional.one_hot(y, logits.shape[-1])
    if y.dim() == 2:
        error = error / y.shape[1]  # each position is an equal part of the mean
    expected = error.flatten(1).square().sum(1).sqrt()
    torch.testing.assert_close(record(model, x, y, parts, clip).errors, expected)


@pytest.mark.parametrize("make", [classifier, language])
def test_gradient_norms_are_autograds(make: Make) -> None:
    model, x, y = make()
    rows = torch.arange(6)
    own = one_by_one(model, lambda m, i: losses(m, x[i], y[i]), rows)
    torch.testing.assert_close(gradient_norms(record(model, x, y, clip=0.01)), own.norm(dim=1))


def test_a_sample_of_weight_zero_has_no_baseline() -> None:
    model, x, y = classifier()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    bindings = bind_layers(model)
    recorder = Recorder(model, optimizer, bindings, everything(bindings))
    weights = torch.tensor([0.0, 1, 1, 1, 1, 1], dtype=torch.float64)
    with recorder.batch(torch.arange(6), weights):
        (losses(model, x, y) * weights).sum().backward()
    optimizer.step()
    segment = recorder.take_segment()
    assert (
        segment.errors.isnan().tolist()
        == gradient_norms(segment).isnan().tolist()
        == [True] + [False] * 5
    )


def test_tracin_is_the_sum_of_explicit_products() -> None:
    model, x, y = classifier()
    segment = record(model, x, y, steps=5)
    before = torch.randn(2, segment.size).double()
    after = torch.randn(2, segment.size).double()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    actual = tracin_scores(
        segment,
        Recorder(model, optimizer, bind_layers(model), everything(bind_layers(model))).update_rule,
        before,
        after,
    )
    for row in range(30):
        step = row // 6
        near = before if step <= 2 else after
        for target in range(2):
            product = sum(
                float(a) * float(b)
                for a, b in zip(segment.contributions[row], near[target], strict=True)
            )
            assert float(actual[row, target]) == pytest.approx(0.1 / (1 + step) * product)

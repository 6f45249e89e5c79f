"""Online selection against gradients of single samples and a greedy search in plain Python."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from secateur.influence.basis import Basis
from secateur.influence.bindings import bind_layers
from secateur.influence.hooks import sample_gradients
from secateur.influence.recorder import Recorder
from secateur.influence.selection import select_grad_align, select_greats, select_randomly
from tests.influence.oracle import everything, one_by_one, relative

Make = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
OPTIMIZERS: dict[str, Make] = {
    "sgd": lambda p: torch.optim.SGD(p, 0.3, weight_decay=0.02),
    "nesterov": lambda p: torch.optim.SGD(p, 0.2, momentum=0.8, nesterov=True),
    "adamw": lambda p: torch.optim.AdamW(p, 0.02, betas=(0.9, 0.95), weight_decay=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 0.02, momentum=0.5, eps=1e-3),
}
LABELS = torch.arange(24) % 3


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.ReLU(inplace=True), nn.Linear(5, 3)).double()


def losses(model: nn.Module, rows: Tensor) -> Tensor:
    """Return the cross-entropy of samples. The last column is the label."""
    return functional.cross_entropy(model(rows[:, :4]), rows[:, 4].long(), reduction="none")


def samples(count: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(count, 4, generator=generator, dtype=torch.float64)
    return torch.cat([features, LABELS[:count, None].double()], 1)


def train(make: Make) -> tuple[nn.Module, torch.optim.Optimizer, Recorder]:
    """Return a network after three steps, so that the optimizer's slots are not empty."""
    model = network()
    optimizer = make(model.parameters())
    bindings = bind_layers(model)
    recorder = Recorder(model, optimizer, bindings, everything(bindings))
    for step in range(3):
        optimizer.zero_grad()
        losses(model, samples(8, step)).mean().backward()
        optimizer.step()
    return model, optimizer, recorder


def step_on(
    model: nn.Module, optimizer: torch.optim.Optimizer, gradient: Tensor, basis: Basis
) -> Tensor:
    """Return all parameters after the optimizer's own step on a gradient in all coordinates."""
    model = copy.deepcopy(model)
    state = copy.deepcopy(optimizer.state_dict())
    again = type(optimizer)(
        model.parameters(), **{k: v for k, v in optimizer.defaults.items() if k in ("lr",)}
    )
    again.load_state_dict(state)
    lifted = basis.lift_to_tensors(gradient)
    for name, parameter in model.named_parameters():
        parameter.grad = lifted[name]
    again.step()
    return basis.project_tensors({n: p.detach() for n, p in model.named_parameters()})


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_step_sensitivity_is_the_derivative_of_torchs_own_step(name: str) -> None:
    model, optimizer, recorder = train(OPTIMIZERS[name])
    gradient = one_by_one(model, losses, samples(8, 9)).mean(0)
    expected = torch.empty_like(gradient)
    for place in range(len(gradient)):
        bump = torch.zeros_like(gradient)
        bump[place] = 1e-6
        up, down = (
            step_on(model, optimizer, gradient + sign * bump, recorder.basis) for sign in (1, -1)
        )
        expected[place] = (up - down)[place] / 2e-6
    torch.testing.assert_close(recorder.step_sensitivity(gradient), expected, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_grad_align_takes_the_candidates_of_largest_inner_product(name: str) -> None:
    model, _, recorder = train(OPTIMIZERS[name])
    candidates = samples(24, 11)
    target = samples(6, 12)
    by_hand = one_by_one(model, losses, candidates) / 8
    applied = by_hand * recorder.step_sensitivity(by_hand.sum(0) / 3)
    query = one_by_one(model, losses, target).mean(0)
    products = [-float(step @ query) for step in applied]
    bindings = bind_layers(model)
    contributions, _ = sample_gradients(
        lambda rows: losses(model, candidates[rows]), 24, bindings, recorder.basis
    )
    drop, _ = sample_gradients(
        lambda rows: losses(model, target[rows]), 6, bindings, recorder.basis
    )
    contributions = contributions / 8
    steps = contributions * recorder.step_sensitivity(contributions.sum(0) / 3)
    actual = select_grad_align(steps, drop.mean(0), 8)
    assert actual.order.tolist() == sorted(range(24), key=lambda i: -products[i])[:8]
    assert actual.scores.tolist() == pytest.approx(products)


def pick_naively(steps: Tensor, query: Tensor, count: int) -> list[int]:
    """Pick greedily, each gain computed anew: `-<q, s_i> - sum over the picks of <s_i, s_j>`."""
    picked: list[int] = []
    for _ in range(count):
        rest = [i for i in range(len(steps)) if i not in picked]
        gains = [
            -float(steps[i] @ query) - sum(float(steps[i] @ steps[j]) for j in picked) for i in rest
        ]
        picked.append(rest[gains.index(max(gains))])
    return picked


@pytest.mark.parametrize("rate", [0.01, 1.0, 20.0])
def test_greats_picks_like_the_naive_search(rate: float) -> None:
    model = network()
    steps = -rate / 8 * one_by_one(model, losses, samples(24, 1))
    query = one_by_one(model, losses, samples(6, 2)).mean(0)
    actual = select_greats(steps, query, 8)
    assert actual.order.tolist() == pick_naively(steps, query, 8)
    assert actual.scores.tolist() == pytest.approx((-steps @ query).tolist())
    first, second = actual.order[:2].tolist()
    assert float(actual.gains[first]) == pytest.approx(float(-steps[first] @ query))
    assert float(actual.gains[second]) == pytest.approx(
        float(-steps[second] @ query - steps[second] @ steps[first])
    )
    left = next(i for i in range(24) if i not in actual.order.tolist())
    pairs = sum(float(steps[left] @ steps[j]) for j in actual.order.tolist())
    assert float(actual.gains[left]) == pytest.approx(float(-steps[left] @ query) - pairs)


def test_pairs_matter_if_steps_are_long() -> None:
    steps = torch.tensor([[-1.0, 0.0], [-1.0, 0.0], [0.0, -0.5]])
    query = torch.tensor([1.0, 1.0])
    assert select_grad_align(steps, query, 2).order.tolist() == [0, 1]
    assert select_greats(steps, query, 2).order.tolist() == [0, 2]


def test_ties_go_to_the_earlier_candidate() -> None:
    steps = torch.zeros(6, 2)
    for rule in (select_grad_align, select_greats):
        assert rule(steps, torch.ones(2), 3).order.tolist() == [0, 1, 2]


def test_the_random_choice_follows_the_seed() -> None:
    one = select_randomly(60, 20, 1)
    again = select_randomly(60, 20, 1)
    other = select_randomly(60, 20, 2)
    assert one.order.tolist() == again.order.tolist() != other.order.tolist()
    assert len(set(one.order.tolist())) == 20
    assert bool(one.scores.isnan().all())


def test_an_activation_in_place_and_no_weight_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs are overwritten after the capture, and no weight's gradient is formed."""
    model = network()
    rows = samples(9, 3)
    bindings = bind_layers(model)
    parameter_counts: list[int] = []
    whole = torch.autograd.grad

    def counted(outputs: Tensor, inputs: list[Any], **options: Any) -> object:
        parameter_counts.append(sum(isinstance(i, nn.Parameter) for i in inputs))
        return whole(outputs, inputs, **options)

    monkeypatch.setattr(torch.autograd, "grad", counted)
    actual, values = sample_gradients(
        lambda places: losses(model, rows[places]), 9, bindings, everything(bindings)
    )
    assert set(parameter_counts) == {0}
    assert relative(actual, one_by_one(model, losses, rows)) < 1e-12
    torch.testing.assert_close(values, losses(model, rows).detach())

"""Update rules against torch's own steps, and against autograd through these steps."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from secateur.influence.optimizers import UpdateRule, fetch_numbers, find_update_rule
from secateur.influence.tape import Tape

STEPS = 60
Options = dict[str, Any]
Kind = type[torch.optim.Optimizer]


class Draw:
    """Random settings of optimizers. Four seeds give every pair of coins all four results."""

    def __init__(self, seed: int) -> None:
        self.coins = (seed & 1 > 0, seed & 2 > 0)
        self.generator = torch.Generator().manual_seed(seed)

    def share(self, low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=self.generator))

    def power(self, low: float, high: float) -> float:
        return float(10 ** self.share(low, high))

    def coin(self) -> bool:
        first, second = self.coins
        self.coins = (second, first)
        return first

    def normal(self, *size: int) -> Tensor:
        return torch.randn(size, generator=self.generator, dtype=torch.float64)


def adaptive(draw: Draw) -> Options:
    betas = (draw.share(0.5, 0.95), draw.share(0.5, 0.999))
    return common(draw) | {"betas": betas, "eps": draw.power(-8, -1)}


def common(draw: Draw) -> Options:
    return {
        "lr": draw.power(-3, -1),
        "weight_decay": draw.power(-3, -1),
        "maximize": draw.coin(),
    }


def sgd(draw: Draw) -> Options:
    nesterov = draw.coin()
    dampening = 0.0 if nesterov else draw.share(0, 0.5)
    return common(draw) | {
        "momentum": draw.share(0.1, 0.95),
        "dampening": dampening,
        "nesterov": nesterov,
    }


def nadam(draw: Draw) -> Options:
    decay = {"momentum_decay": draw.power(-3, 0), "decoupled_weight_decay": draw.coin()}
    return adaptive(draw) | decay


def adagrad(draw: Draw) -> Options:
    start = draw.share(0, 0.5)
    decay = {"lr_decay": draw.power(-3, 0), "initial_accumulator_value": start}
    return common(draw) | decay | {"eps": draw.power(-10, -1)}


def rmsprop(draw: Draw) -> Options:
    settings = {"momentum": draw.share(0.1, 0.9), "centered": draw.coin()}
    return common(draw) | settings | {"alpha": draw.share(0.5, 0.99), "eps": draw.power(-8, -1)}


SETTINGS: dict[Kind, Callable[[Draw], Options]] = {
    torch.optim.SGD: sgd,
    torch.optim.Adam: lambda draw: adaptive(draw) | {"amsgrad": draw.coin()},
    torch.optim.AdamW: lambda draw: adaptive(draw) | {"amsgrad": draw.coin()},
    torch.optim.NAdam: nadam,
    torch.optim.RAdam: lambda draw: adaptive(draw) | {"decoupled_weight_decay": draw.coin()},
    torch.optim.Adagrad: adagrad,
    torch.optim.RMSprop: rmsprop,
}
# Settings of a second group, which lacks state that the first one has, or the other way round.
WITHOUT: dict[Kind, Options] = {
    torch.optim.SGD: {"momentum": 0.0, "nesterov": False},
    torch.optim.Adam: {"amsgrad": False, "decoupled_weight_decay": True},
    torch.optim.AdamW: {"amsgrad": False},
    torch.optim.RMSprop: {"momentum": 0.0, "centered": False},
}


class Tensors(nn.Module):
    """Three parameters in two groups."""

    def __init__(self, draw: Draw) -> None:
        super().__init__()
        self.a = nn.Parameter(draw.normal(3, 2))
        self.b = nn.Parameter(draw.normal(4))
        self.c = nn.Parameter(draw.normal(2, 2))

    def optimizer(self, kind: Kind, options: Options, other: Options) -> torch.optim.Optimizer:
        groups = [{"params": [self.a, self.b]}, {"params": [self.c], **other}]
        return kind(groups, **options)


def check_updates(
    model: Tensors, optimizer: torch.optim.Optimizer, draw: Draw, late: bool = True
) -> None:
    """Compare every step with the rule's update of the values before it.

    Args:
        late: whether a parameter's first gradient may come after the first step.
    """
    tape = Tape(model, optimizer)
    missing = 0
    for step in range(STEPS + 1):
        for parameter in model.parameters():
            absent = (late or step > 0) and draw.share(0, 1) < 0.3
            missing += absent
            parameter.grad = None if absent else draw.normal(*parameter.shape)
        optimizer.step()
    assert missing > 20
    rule = tape.update_rule
    assert isinstance(tape.steps, list)
    for before, after in zip(tape.steps, tape.steps[1:], strict=False):
        for number, group in enumerate(optimizer.param_groups):
            state = before.states[number]
            new = rule.update(state, before.gradients[number], before.hyper[number])
            skipped = before.skipped[number]
            expected = new if skipped is None else torch.where(skipped, state, new)
            own = optimizer.state[group["params"][0]]
            rows = [0, *(i for i, slot in enumerate(rule.slots, 1) if own.get(slot) is not None)]
            torch.testing.assert_close(
                after.states[number][rows], expected[rows], rtol=1e-6, atol=1e-9
            )


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("kind", SETTINGS)
def test_updates_are_those_of_the_real_optimizer(kind: Kind, seed: int) -> None:
    draw = Draw(seed)
    options = SETTINGS[kind](draw)
    other = SETTINGS[kind](draw) | WITHOUT.get(kind, {})
    model = Tensors(draw)
    check_updates(model, model.optimizer(kind, options, other), draw)


CAPTURABLE = [k for k in SETTINGS if k not in (torch.optim.SGD, torch.optim.Adagrad)]
FUSED = [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.Adagrad]
IMPLEMENTATIONS = [
    *((kind, {"foreach": True}) for kind in SETTINGS),
    *((kind, {"fused": True}) for kind in FUSED),
    *((kind, {"capturable": True}) for kind in CAPTURABLE),
    *((kind, {"capturable": True, "foreach": True}) for kind in CAPTURABLE),
    *((kind, {"lr": torch.tensor(0.05, dtype=torch.float64)}) for kind in SETTINGS),
    *(
        (kind, {"betas": (torch.tensor(0.8), torch.tensor(0.95)), "lr": torch.tensor(0.05)})
        for kind in (torch.optim.Adam, torch.optim.AdamW)
    ),
]


@pytest.mark.parametrize(("kind", "how"), IMPLEMENTATIONS, ids=str)
def test_updates_are_those_of_every_implementation(
    kind: Kind, how: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Capturable steps are for GPUs. Their arithmetic, with steps as tensors, runs on a CPU too.
    for name in ("torch.optim.adam", kind.__module__):
        module = import_module(name)
        if hasattr(module, "_get_capturable_supported_devices"):
            monkeypatch.setattr(module, "_get_capturable_supported_devices", lambda **_: ["cpu"])
    draw = Draw(0)
    options = SETTINGS[kind](draw) | how
    model = Tensors(draw)
    # torch's fused SGD fails if a parameter gets its first gradient later than the others.
    late = kind is not torch.optim.SGD or "fused" not in how
    check_updates(model, model.optimizer(kind, options, {}), draw, late)


def real_step(
    kind: Kind, options: Options, rule: UpdateRule, scalars: dict[str, Tensor], *inputs: Tensor
) -> Tensor:
    """Return theta and the slots after torch's own step, through which autograd differentiates."""
    theta, *slots, gradient = (tensor.clone() for tensor in inputs)
    optimizer = kind([theta], **options, differentiable=True)  # type: ignore[call-arg]
    state = dict(zip(rule.slots, slots, strict=True))
    optimizer.state[theta] = state | {name: value.clone() for name, value in scalars.items()}
    theta.grad = gradient
    optimizer.step()
    new = optimizer.state[theta]
    return torch.stack([theta, *(new[slot] for slot in rule.slots)])


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("kind", SETTINGS)
def test_derivatives_are_those_of_autograd_through_the_real_step(kind: Kind, seed: int) -> None:
    draw = Draw(seed)
    options = SETTINGS[kind](draw)
    theta = nn.Parameter(draw.normal(5))
    optimizer = kind([theta], **options)
    rule = find_update_rule(optimizer)
    for _ in range(12):
        theta.grad = draw.normal(5)
        optimizer.step()
        state = optimizer.state[theta]
        values = [theta.detach(), *(state[slot] for slot in rule.slots)]
        gradient = draw.normal(5)
        h = {
            name: torch.tensor(value, dtype=torch.float64)
            for name, value in zip(
                rule.hyper, rule.settings(optimizer.param_groups[0], state), strict=True
            )
        }
        scalars = {n: v for n, v in state.items() if isinstance(v, Tensor) and v.dim() == 0}
        inputs = tuple(value.clone() for value in (*values, gradient))
        expected = torch.autograd.functional.jacobian(
            partial(real_step, kind, options, rule, scalars), inputs
        )
        for slot in range(rule.state_tensors):
            later = torch.zeros(rule.state_tensors, 5, dtype=torch.float64)
            later[slot] = 1
            by_state, by_gradient = rule.vjp(later, torch.stack(values), gradient, h)
            for actual, whole in zip((*by_state, by_gradient), expected, strict=True):
                # The step works element by element.
                torch.testing.assert_close(
                    actual.diag(), whole[slot], rtol=1e-6, atol=1e-9 * (1 + float(actual.norm()))
                )


def test_numbers_are_fetched_from_each_device_at_once() -> None:
    tensor = torch.ones(2)
    state = {"step": torch.tensor(3.0), "average": tensor, "buffer": None, "count": 5}
    first, second = fetch_numbers([state, {"lr": torch.tensor(0.5, dtype=torch.float64)}])
    assert first == {"step": 3.0, "average": tensor, "buffer": None, "count": 5}
    assert first["average"] is tensor
    assert second == {"lr": 0.5}
    assert isinstance(state["step"], Tensor)


def test_nothing_flows_through_a_gradient_whose_square_is_zero() -> None:
    theta = nn.Parameter(torch.tensor([1.0, 1.0]))
    optimizer = torch.optim.Adam([theta], 0.1)
    rule = find_update_rule(optimizer)
    gradient = torch.tensor([1e-25, 1e-3])
    theta.grad = gradient
    optimizer.step()
    state = optimizer.state[theta]
    values = torch.stack([theta.detach(), state["exp_avg"], state["exp_avg_sq"]])
    assert values[1, 0] > 0
    assert values[2, 0] == 0
    settings = rule.settings(optimizer.param_groups[0], state)
    h = dict(zip(rule.hyper, torch.tensor(settings), strict=True))
    by_state, by_gradient = rule.vjp(torch.ones(3, 2), values, gradient, h)
    # The largest is that of the first moment, which is divided by epsilon.
    assert float(by_state.abs().max()) < 1e8
    assert float(by_gradient[0]) == 0


def test_radam_begins_with_plain_momentum_for_elements_without_gradient_too() -> None:
    optimizer = torch.optim.RAdam([torch.ones(2)], 0.1)
    rule = find_update_rule(optimizer)
    group = optimizer.param_groups[0]
    h = dict(zip(rule.hyper, torch.tensor(rule.settings(group, {})).double(), strict=True))
    later = torch.tensor([[1.0], [0.0], [0.0]], dtype=torch.float64).expand(3, 2)
    state = torch.zeros(3, 2, dtype=torch.float64)
    _, by_gradient = rule.vjp(later, state, torch.zeros(2, dtype=torch.float64), h)
    torch.testing.assert_close(by_gradient, torch.full((2,), -0.1, dtype=torch.float64))


@pytest.mark.parametrize(
    "kind",
    [
        torch.optim.Adam,
        torch.optim.AdamW,
        torch.optim.NAdam,
        torch.optim.RAdam,
        torch.optim.Adagrad,
        torch.optim.RMSprop,
    ],
)
def test_theta_goes_through_where_the_state_has_stayed_zero(
    kind: type[torch.optim.Optimizer],
) -> None:
    """A regression: its derivative was lost beside that of the gradient, which is infinite."""
    parameter = nn.Parameter(torch.ones(3, dtype=torch.float64))
    optimizer = kind([parameter], lr=0.1, weight_decay=0.0)  # type: ignore[call-arg]
    rule = find_update_rule(optimizer)
    row = rule.settings(optimizer.param_groups[0], {})
    h = {n: torch.tensor(v, dtype=torch.float64) for n, v in zip(rule.hyper, row, strict=True)}
    state = torch.zeros(rule.state_tensors, 3, dtype=torch.float64)
    later = torch.zeros_like(state)
    later[0] = 1
    by_state, _ = rule.vjp(later, state, torch.zeros(3, dtype=torch.float64), h)
    assert by_state[0].tolist() == [1.0, 1.0, 1.0]

"""Each update rule against the real optimizer: its update, and the Jacobian by differences."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from secateur.errors import SecateurError
from secateur.influence.bindings import bind_layers
from secateur.influence.coordinate_basis import CoordinateBasis
from secateur.influence.optimizers import (
    Hyperparameters,
    ParameterGroups,
    UpdateRule,
    find_update_rule,
    refuse_option,
    register_update_rule,
    registry,
)
from secateur.influence.optimizers.adam import AdamUpdate, AdamWUpdate
from secateur.influence.recorder import Recorder


class SmoothLion(torch.optim.Optimizer):
    """A user's own optimizer: Lion with tanh in place of the sign, warm-up and decoupled decay."""

    def __init__(self, params: Iterable[nn.Parameter], lr: float, **options: Any) -> None:
        defaults = {"betas": (0.9, 0.99), "width": 0.5, "weight_decay": 0.1, "cautious": False}
        super().__init__(params, {"lr": lr, **defaults, **options})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                assert parameter.grad is not None
                state = self.state[parameter]
                average = state.setdefault("average", torch.zeros_like(parameter))
                state["step"] = state.get("step", 0) + 1
                new = lion(parameter, average, parameter.grad, group, state["step"])
                parameter.copy_(new[0])
                average.copy_(new[1])


def lion(
    theta: Tensor, average: Tensor, grad: Tensor, group: dict[str, Any], step: int
) -> tuple[Tensor, Tensor]:
    """The optimizer's own arithmetic, written apart from the rule."""
    beta1, beta2 = group["betas"]
    direction = torch.tanh((average * beta1 + grad * (1 - beta1)) / group["width"])
    rate = group["lr"] * (1 - math.exp(-step))
    decayed = theta - rate * group["weight_decay"] * theta
    return decayed - rate * direction, average * beta2 + grad * (1 - beta2)


@register_update_rule(SmoothLion)
class SmoothLionUpdate(UpdateRule):
    hyper = ("lr", "beta1", "beta2", "width", "weight_decay", "step")
    slots = ("average",)

    @classmethod
    def from_groups(cls, groups: ParameterGroups) -> UpdateRule:
        refuse_option(groups, "cautious")
        return cls()

    def update(self, state: Tensor, grad: Tensor, h: Hyperparameters) -> Tensor:
        theta, average = state
        mixed = h["beta1"] * average + (1 - h["beta1"]) * grad
        rate = h["lr"] * (1 - torch.exp(-h["step"]))
        theta = theta * (1 - rate * h["weight_decay"]) - rate * torch.tanh(mixed / h["width"])
        return torch.stack([theta, h["beta2"] * average + (1 - h["beta2"]) * grad])


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1, weight_decay=0.01),
    "momentum": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.01),
    "dampening": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, dampening=0.3),
    "nesterov": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    "maximize": lambda p: torch.optim.SGD(p, 0.1, momentum=0.5, maximize=True),
    "adamw": lambda p: torch.optim.AdamW(p, 0.1, betas=(0.9, 0.95), weight_decay=0.1),
    "adamw with a large epsilon": lambda p: torch.optim.AdamW(
        p, 0.1, betas=(0.8, 0.9), eps=0.3, maximize=True
    ),
    "adam": lambda p: torch.optim.Adam(p, 0.1, betas=(0.8, 0.9), weight_decay=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 0.1, weight_decay=0.1),
    "rmsprop with momentum": lambda p: torch.optim.RMSprop(p, 0.1, momentum=0.8, eps=0.1),
    "a user's own": lambda p: SmoothLion(p, 0.1),
}
STEPS = 4


def play(
    name: str, nudge: tuple[int, str, float] | None = None
) -> tuple[list[torch.Tensor], Recorder]:
    """Return the states after each of some steps with given gradients.

    `nudge` names a step, changes theta, a slot or the gradient before it, and says by how much.
    """
    torch.manual_seed(0)
    model = nn.Linear(3, 2, bias=False).double()
    gradients = torch.randn(STEPS, 2, 3).double()
    optimizer = OPTIMIZERS[name](model.parameters())
    bindings = bind_layers(model)
    recorder = Recorder(
        model, optimizer, bindings, CoordinateBasis(bindings.blocks, [torch.arange(6)])
    )
    slots = recorder.update_rule.slots
    states = []
    for step in range(STEPS):
        model.weight.grad = gradients[step].clone()
        if nudge and nudge[0] == step:
            _nudge(model.weight, optimizer, nudge[1], nudge[2])
        optimizer.step()
        tensors = [model.weight.detach(), *(optimizer.state[model.weight][s] for s in slots)]
        states.append(torch.stack([tensor.clone() for tensor in tensors]).flatten(1))
    return states, recorder


def _nudge(weight: Tensor, optimizer: torch.optim.Optimizer, what: str, by: float) -> None:
    with torch.no_grad():
        if what == "theta":
            weight.add_(by)
        elif what == "gradient":
            assert weight.grad is not None
            weight.grad.add_(by)
        else:
            optimizer.state[weight][what] += by


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_jacobian_is_that_of_the_real_step(name: str) -> None:
    _, recorder = play(name)
    segment = recorder.take_segment()
    ds, dg = recorder.update_rule.jacobian(segment)
    eps = 1e-7
    for step in range(STEPS):
        for j, what in enumerate(("theta", *recorder.update_rule.slots, "gradient")):
            if step == 0 and what not in ("theta", "gradient"):
                continue  # the slots do not exist yet
            up, down = (play(name, (step, what, sign * eps))[0][step] for sign in (1, -1))
            expected = (up - down) / (2 * eps)
            actual = dg[step] if what == "gradient" else ds[step, :, j]
            torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_update_is_that_of_the_real_step(name: str) -> None:
    states, recorder = play(name)
    segment = recorder.take_segment()
    rule = recorder.update_rule
    torch.manual_seed(0)
    weight = nn.Linear(3, 2, bias=False).double().weight.detach()
    gradients = torch.randn(STEPS, 6).double()
    state = torch.zeros(1 + len(rule.slots), 6, dtype=torch.float64)
    state[0] = weight.flatten()
    for step in range(STEPS):
        h = dict(zip(rule.hyper, segment.hyper[step, segment.groups].unbind(-1), strict=True))
        state = rule.update(state, gradients[step], h)
        torch.testing.assert_close(state, states[step])


def test_a_users_rule_has_the_derivatives_of_the_users_optimizer() -> None:
    states, recorder = play("a user's own")
    assert isinstance(recorder.update_rule, SmoothLionUpdate)
    ds, dg = recorder.update_rule.jacobian(recorder.take_segment())
    torch.manual_seed(0)
    nn.Linear(3, 2, bias=False)  # `play` draws the gradients after the layer's weights
    gradients = torch.randn(STEPS, 6).double()
    group = SmoothLion(nn.Linear(1, 1).parameters(), 0.1).param_groups[0]
    for step in range(1, STEPS):
        theta, average = states[step - 1]
        for slot in range(2):
            by_theta, by_average, by_gradient = torch.autograd.functional.jacobian(
                lambda theta, average, gradient, slot=slot, step=step: lion(
                    theta, average, gradient, group, step + 1
                )[slot],
                (theta, average, gradients[step]),
            )
            torch.testing.assert_close(ds[step, slot, 0], by_theta.diag())
            torch.testing.assert_close(ds[step, slot, 1], by_average.diag())
            torch.testing.assert_close(dg[step, slot], by_gradient.diag())


def test_the_registrys_example_works() -> None:
    class SignMomentum(torch.optim.Optimizer):
        pass

    assert registry.__doc__ is not None
    example = registry.__doc__.partition("::\n")[2].partition("\nThe module")[0]
    names: dict[str, Any] = {"SignMomentum": SignMomentum}
    exec(textwrap.dedent(example), names)
    optimizer = SignMomentum(nn.Linear(3, 2).parameters(), {"lr": 0.1, "beta": 0.9})
    rule = find_update_rule(optimizer)
    assert isinstance(rule, names["SignMomentumUpdate"])
    theta, average, grad = torch.tensor([0.5, 2.0, 3.0], dtype=torch.float64)
    state = torch.stack([theta, average])
    actual = rule.update(state, grad, {"lr": torch.tensor(0.1), "beta": torch.tensor(0.9)})
    assert actual.tolist() == pytest.approx([0.5 - 0.1 * math.tanh(2.1), 2.1])


def test_only_the_exact_class_of_an_optimizer_counts() -> None:
    class Changed(torch.optim.SGD):
        pass

    with pytest.raises(SecateurError, match="Changed is not known"):
        find_update_rule(Changed(nn.Linear(3, 2).parameters(), 0.1))


def test_adam_with_decoupled_decay_is_adamw() -> None:
    parameters = list(nn.Linear(3, 2).parameters())
    assert type(find_update_rule(torch.optim.Adam(parameters))) is AdamUpdate
    assert type(find_update_rule(torch.optim.AdamW(parameters))) is AdamWUpdate
    decoupled = torch.optim.Adam(parameters)
    # An option of Adam in newer versions of torch.
    decoupled.param_groups[0]["decoupled_weight_decay"] = True
    assert type(find_update_rule(decoupled)) is AdamWUpdate


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW, SmoothLion])
def test_a_learned_learning_rate_is_refused(kind: type[torch.optim.Optimizer]) -> None:
    optimizer = kind(nn.Linear(3, 2).parameters(), lr=0.1)  # type: ignore[call-arg]
    optimizer.param_groups[0]["lr"] = torch.tensor(0.1, requires_grad=True)
    with pytest.raises(SecateurError, match=f"{kind.__name__} with a learning rate that is itself"):
        find_update_rule(optimizer)


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.Adam(p, amsgrad=True),
        lambda p: torch.optim.AdamW(p, amsgrad=True),
        lambda p: torch.optim.RMSprop(p, centered=True),
        lambda p: SmoothLion(p, 0.1, cautious=True),
    ],
)
def test_an_option_that_is_not_followed_is_refused(
    make: Callable[..., torch.optim.Optimizer],
) -> None:
    with pytest.raises(SecateurError, match="=True, which is not known"):
        find_update_rule(make(nn.Linear(3, 2).parameters()))


@pytest.mark.parametrize("kind", [torch.optim.Adagrad, torch.optim.Rprop])
def test_an_unknown_optimizer_is_refused_by_name(kind: type[torch.optim.Optimizer]) -> None:
    model = nn.Linear(3, 2)
    bindings = bind_layers(model)
    basis = CoordinateBasis(bindings.blocks, [torch.arange(8)])
    with pytest.raises(SecateurError, match=f"{kind.__name__} is not known") as caught:
        Recorder(model, kind(model.parameters(), lr=0.1), bindings, basis)  # type: ignore[call-arg]
    for part in ("torch.optim.adamw.AdamW", "torch.optim.sgd.SGD", "register_update_rule"):
        assert part in str(caught.value)

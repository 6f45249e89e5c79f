"""Each update rule against the real optimizer: its update, and the Jacobian by differences."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Iterable
from dataclasses import replace
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
    choose_update_rule,
    find_update_rule,
    refuse_option,
    register_update_rule,
    registry,
)
from secateur.influence.optimizers.adam import AdamUpdate, AdamWUpdate
from secateur.influence.recorder import Recorder
from secateur.influence.tape import Tape


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
    "amsgrad": lambda p: torch.optim.AdamW(p, 0.1, betas=(0.5, 0.6), amsgrad=True),
    "adam with decoupled decay": lambda p: torch.optim.Adam(
        p, 0.1, weight_decay=0.1, decoupled_weight_decay=True, amsgrad=True
    ),
    "nadam": lambda p: torch.optim.NAdam(p, 0.1, weight_decay=0.1, momentum_decay=0.1),
    "nadam with decoupled decay": lambda p: torch.optim.NAdam(
        p, 0.1, weight_decay=0.1, decoupled_weight_decay=True, maximize=True
    ),
    # With this beta2 the sixth step is the first that is rectified; with the next one, none is.
    "radam": lambda p: torch.optim.RAdam(p, 0.1, betas=(0.8, 0.99), weight_decay=0.1),
    "radam with decoupled decay": lambda p: torch.optim.RAdam(
        p, 0.1, betas=(0.8, 0.5), weight_decay=0.1, decoupled_weight_decay=True
    ),
    "adagrad": lambda p: torch.optim.Adagrad(p, 0.1, lr_decay=0.3, weight_decay=0.1, eps=0.1),
    "adagrad that begins above zero": lambda p: torch.optim.Adagrad(
        p, 0.1, initial_accumulator_value=0.5
    ),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 0.1, weight_decay=0.1),
    "rmsprop with momentum": lambda p: torch.optim.RMSprop(p, 0.1, momentum=0.8, eps=0.1),
    "centered": lambda p: torch.optim.RMSprop(p, 0.1, alpha=0.5, eps=0.1, centered=True),
    "centered with momentum": lambda p: torch.optim.RMSprop(
        p, 0.1, alpha=0.5, eps=0.1, momentum=0.8, centered=True
    ),
    "a user's own": lambda p: SmoothLion(p, 0.1),
}
STEPS = 8


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
    if not rule.linear:
        # Adagrad's sum need not begin at zero.
        state = segment.states[0]
    for step in range(STEPS):
        h = dict(zip(rule.hyper, segment.hyper[step, segment.groups].unbind(-1), strict=True))
        state = rule.update(state, gradients[step], h)
        # NAdam's product of momentum factors is kept in single precision.
        torch.testing.assert_close(state, states[step], rtol=1e-6, atol=1e-7)


def test_a_segment_of_another_version_is_refused() -> None:
    _, recorder = play("adam")
    segment = recorder.take_segment()
    older = replace(segment, hyper=segment.hyper[..., :7])
    with pytest.raises(SecateurError, match="7 settings per step and AdamUpdate reads 9"):
        recorder.update_rule.jacobian(older)


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
    decoupled = torch.optim.Adam(parameters, decoupled_weight_decay=True)
    assert type(find_update_rule(decoupled)) is AdamWUpdate


def test_before_torch_2_7_the_class_says_which_weight_decay_it_is() -> None:
    for kind, decoupled in ((torch.optim.Adam, 0.0), (torch.optim.AdamW, 1.0)):
        group = dict(kind(nn.Linear(3, 2).parameters()).param_groups[0])
        del group["decoupled_weight_decay"]
        rule = choose_update_rule(kind, [group])
        settings = dict(zip(rule.hyper, rule.settings(group, {}), strict=True))
        assert settings["decoupled_weight_decay"] == decoupled


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW, SmoothLion])
def test_a_learned_learning_rate_is_refused(kind: type[torch.optim.Optimizer]) -> None:
    optimizer = kind(nn.Linear(3, 2).parameters(), lr=0.1)  # type: ignore[call-arg]
    optimizer.param_groups[0]["lr"] = torch.tensor(0.1, requires_grad=True)
    with pytest.raises(SecateurError, match=f"{kind.__name__} with a learning rate that is itself"):
        find_update_rule(optimizer)


def test_a_learned_beta_is_refused() -> None:
    optimizer = torch.optim.AdamW(nn.Linear(3, 2).parameters())
    optimizer.param_groups[0]["betas"] = (0.9, torch.tensor(0.99, requires_grad=True))
    with pytest.raises(SecateurError, match="AdamW with a beta2 that is itself learned"):
        find_update_rule(optimizer)


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.Adam(p, differentiable=True),
        lambda p: torch.optim.SGD(p, 0.1, differentiable=True),
        lambda p: SmoothLion(p, 0.1, cautious=True),
    ],
)
def test_an_option_that_is_not_followed_is_refused(
    make: Callable[..., torch.optim.Optimizer],
) -> None:
    with pytest.raises(SecateurError, match="=True, which is not known"):
        find_update_rule(make(nn.Linear(3, 2).parameters()))


@pytest.mark.parametrize("kind", [torch.optim.Adamax, torch.optim.Rprop])
def test_an_unknown_optimizer_is_refused_by_name(kind: type[torch.optim.Optimizer]) -> None:
    model = nn.Linear(3, 2)
    bindings = bind_layers(model)
    basis = CoordinateBasis(bindings.blocks, [torch.arange(8)])
    with pytest.raises(SecateurError, match=f"{kind.__name__} is not known") as caught:
        Recorder(model, kind(model.parameters(), lr=0.1), bindings, basis)  # type: ignore[call-arg]
    for part in ("torch.optim.adamw.AdamW", "torch.optim.sgd.SGD", "register_update_rule"):
        assert part in str(caught.value)


REFUSED = {
    "torch.optim.Adafactor": "averages over rows and columns.*AdamW",
    "transformers.optimization.Adafactor": "averages over rows and columns.*AdamW",
    "torch.optim.Muon": "momentum matrix orthogonal.*SGD with momentum",
    "bitsandbytes.optim.adamw.AdamW8bit": "quantised form.*AdamW for AdamW8bit",
    "bitsandbytes.optim.lion.Lion8bit": "quantised form",
    "torchao.optim.adam.AdamW8bit": "quantised form",
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_followed_is_refused_with_its_reason(name: str) -> None:
    with pytest.raises(SecateurError, match=f"the optimizer {name} .*{REFUSED[name]}"):
        find_update_rule(class_named(name)([torch.ones(2, 2)], {"lr": 0.1}))


@pytest.mark.parametrize("kind", [torch.optim.Adafactor, torch.optim.Muon])
def test_torchs_own_names_are_those_refused(kind: type[torch.optim.Optimizer]) -> None:
    with pytest.raises(SecateurError, match="element by element"):
        find_update_rule(kind([torch.ones(2, 2)]))  # type: ignore[call-arg]


def test_the_name_of_a_refused_module_is_no_prefix_of_another() -> None:
    with pytest.raises(SecateurError, match=r"bitsandbytes\.optimus\.Adam is not known"):
        find_update_rule(class_named("bitsandbytes.optimus.Adam")([torch.ones(2)], {}))


def class_named(name: str) -> type[torch.optim.Optimizer]:
    """A class of a package that is not installed."""
    module, _, own = name.rpartition(".")
    return type(own, (torch.optim.Optimizer,), {"__module__": module})


def test_a_wrapped_optimizer_is_followed() -> None:
    """Accelerate's wrapper has no hooks of its own, and passes the step on."""
    accelerate = pytest.importorskip("accelerate")
    model = nn.Linear(3, 2)
    inner = torch.optim.AdamW(model.parameters(), 0.1)
    wrapped = accelerate.Accelerator(cpu=True).prepare(inner)
    assert type(wrapped) is not type(inner)
    assert type(find_update_rule(wrapped)) is AdamWUpdate
    recorder = Recorder(model, wrapped)
    tape = Tape(model, wrapped)
    for _ in range(2):
        wrapped.zero_grad()
        with recorder.batch([0, 1]) as batch:
            batch.losses = losses = model(torch.randn(2, 3)).square().sum(1)
            losses.mean().backward()
        wrapped.step()
    assert isinstance(tape.steps, list)
    assert len(tape.steps) == 2
    assert recorder.take_segment().length == 2
    assert tape.steps[1].hyper[0]["step"] == 2


def test_lightnings_wrapper_is_followed() -> None:
    wrappers = pytest.importorskip("lightning.pytorch.core.optimizer")
    inner = torch.optim.AdamW(nn.Linear(3, 2).parameters(), 0.1)
    assert type(find_update_rule(wrappers.LightningOptimizer(inner))) is AdamWUpdate


def test_a_wrapper_that_is_not_known_is_refused() -> None:
    """Such a wrapper may train other tensors than the model's."""
    wrapper = class_named("accelerate.utils.deepspeed.DeepSpeedOptimizerWrapper")
    wrapped = wrapper([torch.ones(2)], {})
    wrapped.optimizer = torch.optim.SGD([torch.ones(2)])  # type: ignore[attr-defined]
    with pytest.raises(SecateurError, match="DeepSpeedOptimizerWrapper is not known"):
        find_update_rule(wrapped)

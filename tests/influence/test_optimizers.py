"""Each linearised optimizer against torch's own: its update, and the Jacobian of that update by differences."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from secateur.errors import SecateurError
from secateur.influence.basis import CoordinateBasis
from secateur.influence.bindings import bind_layers
from secateur.influence.optimizers import find_update_rule
from secateur.influence.recorder import Recorder

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
}
STEPS = 4


def play(
    name: str, nudge: tuple[int, str, float] | None = None
) -> tuple[list[torch.Tensor], Recorder]:
    """States after each of some steps with given gradients; `nudge` changes theta, a slot or the gradient of a step."""
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
        held = [optimizer.state[model.weight][slot] for slot in slots]
        states.append(
            torch.stack([model.weight.detach().clone(), *(h.clone() for h in held)]).flatten(1)
        )
    return states, recorder


def _nudge(weight: nn.Parameter, optimizer: torch.optim.Optimizer, what: str, by: float) -> None:
    with torch.no_grad():
        if what == "theta":
            weight += by
        elif what == "gradient":
            weight.grad += by
        else:
            optimizer.state[weight][what] += by


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_jacobian_is_that_of_torchs_own_step(name: str) -> None:
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
            found = dg[step] if what == "gradient" else ds[step, :, j]
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_update_is_torchs_own_step(name: str) -> None:
    states, recorder = play(name)
    segment, linearised = recorder.take_segment(), recorder.update_rule
    torch.manual_seed(0)
    weight, gradients = (
        nn.Linear(3, 2, bias=False).double().weight.detach(),
        torch.randn(STEPS, 6).double(),
    )
    state = torch.zeros(1 + len(linearised.slots), 6, dtype=torch.float64)
    state[0] = weight.flatten()
    for step in range(STEPS):
        h = dict(zip(linearised.hyper, segment.hyper[step, segment.groups].unbind(-1), strict=True))
        state = linearised.update(state, gradients[step], h)
        torch.testing.assert_close(state, states[step])


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.Adam(p, amsgrad=True),
        lambda p: torch.optim.AdamW(p, amsgrad=True),
        lambda p: torch.optim.RMSprop(p, centered=True),
    ],
)
def test_an_option_that_is_not_followed_is_refused(
    make: Callable[..., torch.optim.Optimizer],
) -> None:
    with pytest.raises(SecateurError, match="=True is not known"):
        find_update_rule(make(nn.Linear(3, 2).parameters()))


@pytest.mark.parametrize("kind", [torch.optim.Adagrad, torch.optim.Rprop])
def test_an_unknown_optimizer_is_refused_by_name(kind: type[torch.optim.Optimizer]) -> None:
    model = nn.Linear(3, 2)
    bindings = bind_layers(model)
    basis = CoordinateBasis(bindings.blocks, [torch.arange(8)])
    with pytest.raises(SecateurError, match=f"{kind.__name__} is not known"):
        Recorder(model, kind(model.parameters(), lr=0.1), bindings, basis)

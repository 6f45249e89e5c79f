"""Room `secateur`: replay, the adjoint of training itself for a known target (DESIGN, section 3).

With `q` the sensitivity of the target's loss to the optimizer's state after a step, and `u = -(dF/dg)^T q`, the score of
every sample of the step is the derivative of its loss contribution along `u`, and `q` before the step is
`(dF/ds)^T q - H u`: two ordinary passes at `theta +- eps u`, no projection, every parameter counted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from secateur.errors import SecateurError
from secateur.influence.optimizers import UpdateRule, find_update_rule

# The step of the central differences, relative to the parameters' norm. So wide a step changes nothing where the loss is
# smooth, and where it has kinks (ReLU) it meets as many as a removal does: a shorter one misses their curvature.
STEP = 1e-2

Directions = dict[str, Tensor]  # one tensor a trainable parameter
Adjoint = list[
    Float[Tensor, "S _"]
]  # of each parameter group, a sensitivity to theta and to every slot


@dataclass(frozen=True)
class LossPart:
    """A micro-batch: a forward pass that gives one loss a sample, and the weights of these in the step's loss."""

    losses: Callable[[nn.Module], Float[Tensor, " batch"]]
    weights: Float[Tensor, " batch"]


@dataclass(frozen=True)
class StepState:
    """What a step read, each parameter group's tensors as one vector: the optimizer's state before it, the gradient it
    received, its settings, and what the gradient was multiplied by after the backward pass (clipping by norm)."""

    states: list[Float[Tensor, "S _"]]
    gradients: list[Float[Tensor, " _"]]
    hyper: Sequence[Mapping[str, Tensor]]
    scale: float


class Tape:
    """Keeps what every step of an optimizer reads, while training is run again.

    Args:
        scale: what the coming step's gradient was multiplied by after the backward pass.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        scale: Callable[[], float] = lambda: 1.0,
    ) -> None:
        self.update_rule: UpdateRule = find_update_rule(optimizer)
        self.moments: list[StepState] = []
        self.groups = ParameterGroups(model, optimizer)
        self._optimizer, self._scale = optimizer, scale
        self._handle = optimizer.register_step_pre_hook(self._before_step)

    def close(self) -> None:
        """Stops listening to the optimizer."""
        self._handle.remove()

    def _before_step(self, *_: object) -> None:
        states, gradients, hyper = [], [], []
        for group in self._optimizer.param_groups:
            held = group["params"]
            own = [self._optimizer.state.get(p, {}) for p in held]
            slots = [_joined([s.get(slot) for s in own], held) for slot in self.update_rule.slots]
            states.append(torch.stack([_joined(held, held), *slots]))
            gradients.append(_joined([p.grad for p in held], held))
            row = torch.tensor(
                self.update_rule.settings(group, own[0]), dtype=held[0].dtype, device=held[0].device
            )
            hyper.append(dict(zip(self.update_rule.hyper, row, strict=True)))
        self.moments.append(StepState(states, gradients, hyper, self._scale()))


class ParameterGroups:
    """The parameters of each group of an optimizer, by name, and their tensors as one vector a group."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        names = {id(p): name for name, p in model.named_parameters()}
        self.members = [
            {names[id(p)]: p for p in group["params"]} for group in optimizer.param_groups
        ]

    def split(self, vectors: Sequence[Float[Tensor, " _"]]) -> Directions:
        """One tensor a parameter."""
        found: Directions = {}
        for members, vector in zip(self.members, vectors, strict=True):
            parts = vector.split([p.numel() for p in members.values()])
            found |= {
                name: part.view_as(p)
                for (name, p), part in zip(members.items(), parts, strict=True)
            }
        return found

    def join(self, directions: Directions) -> list[Float[Tensor, " _"]]:
        """One vector a group."""
        return [
            torch.cat([directions[name].flatten() for name in members]) for members in self.members
        ]

    def adjoint(self, gradients: Directions, slots: int) -> Adjoint:
        """A loss's gradient as a sensitivity to the whole state: the optimizer's slots have no part in a loss."""
        return [torch.stack([g, *[torch.zeros_like(g)] * slots]) for g in self.join(gradients)]


def step_back(
    model: nn.Module,
    groups: ParameterGroups,
    moment: StepState,
    linearised: UpdateRule,
    parts: Sequence[LossPart],
    later: Adjoint,
    method: str = "central",
    reseed: Callable[[], Any] = lambda: None,
    step: float = STEP,
) -> tuple[Float[Tensor, " batch"], Adjoint]:
    """One step of the adjoint.

    Args:
        model: left with the parameters it had before the step.
        later: sensitivity to the state after the step.
        method: `central` differences, for any kernel, or `jvp`, exact, for kernels with a forward mode.
        reseed: called before each pass, so that dropout falls as it did.
        step: of the central differences, relative to the parameters' norm.

    Returns:
        The score of every sample of the step, and the sensitivity to the state before it.

    Raises:
        SecateurError: `jvp` is asked of a kernel that has no forward mode.
    """
    read = zip(later, moment.states, moment.gradients, moment.hyper, strict=True)
    pulled = [linearised.vjp(*place) for place in read]
    direction = groups.split([-by_gradient for _, by_gradient in pulled])
    with torch.no_grad():
        for name, value in groups.split([state[0] for state in moment.states]).items():
            model.get_parameter(name).copy_(value)
    if method == "jvp":
        scores, answer = _jvp(model, parts, direction, reseed)
    else:
        scores, answer = _central(model, parts, direction, reseed, step)
    earlier = [by_state for by_state, _ in pulled]
    for q, change in zip(earlier, groups.join(answer), strict=True):
        q[0] -= moment.scale * change
    return moment.scale * scores, earlier


def _central(
    model: nn.Module,
    parts: Sequence[LossPart],
    direction: Directions,
    reseed: Callable[[], Any],
    relative: float,
) -> tuple[Tensor, Directions]:
    """Derivatives along `direction`, of every loss contribution and of the gradient, by central differences."""
    named = {name: p for name, p in model.named_parameters() if name in direction}
    length = torch.stack([d.norm() for d in direction.values()]).norm()
    size = torch.stack([p.detach().norm() for p in named.values()]).norm()
    count = sum(len(part.weights) for part in parts)
    if not length > 0:
        return torch.zeros(count, dtype=length.dtype), {
            name: torch.zeros_like(p) for name, p in named.items()
        }
    step = float(relative * size / length)
    before = {name: p.detach().clone() for name, p in named.items()}
    found = []
    for sign in (1, -1):
        with torch.no_grad():
            for name, parameter in named.items():
                parameter.copy_(before[name] + sign * step * direction[name])
        reseed()
        found.append(_pass(model, parts, named))
    with torch.no_grad():
        for name, parameter in named.items():
            parameter.copy_(before[name])
    (up, gradients_up), (down, gradients_down) = found
    change = {
        n: (a - b) / (2 * step) for n, a, b in zip(named, gradients_up, gradients_down, strict=True)
    }
    return (up - down) / (2 * step), change


def _pass(
    model: nn.Module, parts: Sequence[LossPart], named: Mapping[str, Tensor]
) -> tuple[Tensor, list[Tensor]]:
    """Every sample's part of the loss, and the gradient of their sum."""
    values, total = [], [torch.zeros_like(p) for p in named.values()]
    for part in parts:
        losses = part.losses(model)
        weighted = losses * part.weights.to(losses)
        gradients = torch.autograd.grad(
            weighted.sum(), list(named.values()), materialize_grads=True
        )
        values.append(weighted.detach().double().cpu())
        total = [a + b for a, b in zip(total, gradients, strict=True)]
    return torch.cat(values), total


class _Weighted(nn.Module):
    """A part of the loss as a module, so that its parameters can be replaced for one call."""

    def __init__(self, model: nn.Module, part: LossPart) -> None:
        super().__init__()
        self.model, self.part = model, part

    def forward(self) -> Tensor:
        losses = self.part.losses(self.model)
        return losses * self.part.weights.to(losses)


def _jvp(
    model: nn.Module, parts: Sequence[LossPart], direction: Directions, reseed: Callable[[], Any]
) -> tuple[Tensor, Directions]:
    """The same, exactly, by forward over reverse differentiation."""
    names = [f"model.{name}" for name in direction]
    values, total = [], {name: torch.zeros_like(d) for name, d in direction.items()}
    reseed()
    for part in parts:
        module = _Weighted(model, part)
        held = {name: p.detach() for name, p in module.named_parameters() if name in names}

        def loss(parameters: Directions, module: nn.Module = module) -> tuple[Tensor, Tensor]:
            weighted = torch.func.functional_call(module, parameters, ())
            return weighted.sum(), weighted

        along = {name: direction[name.removeprefix("model.")] for name in held}
        try:
            change, moved = torch.func.jvp(torch.func.grad(loss, has_aux=True), (held,), (along,))[
                1
            ]
        except (NotImplementedError, RuntimeError) as error:
            if "forward" not in str(error):
                raise
            raise SecateurError(
                f"a kernel of the model has no forward mode ({str(error).splitlines()[0]}); set `replay: {{method: central}}`"
            ) from error
        values.append(moved.detach().double().cpu())
        total = {name: t + change[f"model.{name}"] for name, t in total.items()}
    return torch.cat(values), total


def _joined(values: Sequence[Tensor | None], like: Sequence[Tensor]) -> Float[Tensor, " _"]:
    """Copies of tensors as one vector, zeros where there is none."""
    return torch.cat(
        [
            (torch.zeros_like(p) if v is None else v.detach()).flatten()
            for v, p in zip(values, like, strict=True)
        ]
    )

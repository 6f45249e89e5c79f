"""Replay: the adjoint of training itself, for a known target.

With `q` the sensitivity of the target's loss to the optimizer's state after a step, and
`u = -(dF/dg)^T q`, the score of every sample of the step is the derivative of its loss contribution
along `u`, and `q` before the step is `(dF/ds)^T q - H u`. Both come from two ordinary passes at
`theta +- eps u`. There is no projection, and every parameter counts.
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

# The step of the central differences, relative to the parameters' norm. If the loss is smooth, so
# wide a step changes nothing. If it has kinks (ReLU), the step crosses as many of them as a removal
# does; a shorter one would miss their curvature.
STEP = 1e-2

# One tensor per trainable parameter.
Directions = dict[str, Tensor]
# For each parameter group, a sensitivity to theta and to every slot.
Adjoint = list[Float[Tensor, "S _"]]


@dataclass(frozen=True)
class LossPart:
    """A micro-batch.

    Attributes:
        losses: a forward pass that returns one loss per sample.
        weights: the weights of these in the step's loss.
    """

    losses: Callable[[nn.Module], Float[Tensor, " batch"]]
    weights: Float[Tensor, " batch"]


@dataclass(frozen=True)
class StepState:
    """The values that a step read, each parameter group's tensors as one vector.

    Attributes:
        states: theta and the optimizer's slots before the step, per group.
        gradients: the gradient received, per group.
        hyper: the update rule's settings, per group.
        scale: the factor applied to the gradient after the backward pass (clipping by norm).
    """

    states: list[Float[Tensor, "S _"]]
    gradients: list[Float[Tensor, " _"]]
    hyper: Sequence[Mapping[str, Tensor]]
    scale: float


class Tape:
    """A record of the values that every step of an optimizer reads, while training is run again.

    Attributes:
        update_rule: the optimizer's update rule.
        steps: the recorded steps, the first one first.
        groups: the optimizer's parameter groups.

    Args:
        model: the model.
        optimizer: the optimizer.
        scale: returns the factor applied to the coming step's gradient after the backward pass.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        scale: Callable[[], float] = lambda: 1.0,
    ) -> None:
        self.update_rule: UpdateRule = find_update_rule(optimizer)
        self.steps: list[StepState] = []
        self.groups = ParameterGroups(model, optimizer)
        self._optimizer = optimizer
        self._scale = scale
        self._handle = optimizer.register_step_pre_hook(self._before_step)

    def close(self) -> None:
        """Stop listening to the optimizer."""
        self._handle.remove()

    def _before_step(self, *_: object) -> None:
        states = []
        gradients = []
        hyper = []
        for group in self._optimizer.param_groups:
            parameters = group["params"]
            own = [self._optimizer.state.get(p, {}) for p in parameters]
            slots = [
                _join_tensors([state.get(slot) for state in own], parameters)
                for slot in self.update_rule.slots
            ]
            states.append(torch.stack([_join_tensors(parameters, parameters), *slots]))
            gradients.append(_join_tensors([p.grad for p in parameters], parameters))
            row = torch.tensor(
                self.update_rule.settings(group, own[0]),
                dtype=parameters[0].dtype,
                device=parameters[0].device,
            )
            hyper.append(dict(zip(self.update_rule.hyper, row, strict=True)))
        self.steps.append(StepState(states, gradients, hyper, self._scale()))


class ParameterGroups:
    """An optimizer's parameters by group and name, and their tensors as one vector per group."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        names = {id(p): name for name, p in model.named_parameters()}
        self.members = [
            {names[id(p)]: p for p in group["params"]} for group in optimizer.param_groups
        ]

    def split(self, vectors: Sequence[Float[Tensor, " _"]]) -> Directions:
        """Return one tensor per parameter from one vector per group."""
        directions: Directions = {}
        for members, vector in zip(self.members, vectors, strict=True):
            parts = vector.split([p.numel() for p in members.values()])
            for (name, parameter), part in zip(members.items(), parts, strict=True):
                directions[name] = part.view_as(parameter)
        return directions

    def join(self, directions: Directions) -> list[Float[Tensor, " _"]]:
        """Return one vector per group from one tensor per parameter."""
        return [
            torch.cat([directions[name].flatten() for name in members]) for members in self.members
        ]

    def start_adjoint(self, gradients: Directions, slots: int) -> Adjoint:
        """Return a loss's gradient as a sensitivity to the whole state.

        A loss does not depend on the optimizer's slots, so their part is zero.
        """
        return [torch.stack([g, *[torch.zeros_like(g)] * slots]) for g in self.join(gradients)]


def step_back(
    model: nn.Module,
    groups: ParameterGroups,
    state: StepState,
    update_rule: UpdateRule,
    parts: Sequence[LossPart],
    later: Adjoint,
    method: str = "central",
    reseed: Callable[[], Any] = lambda: None,
    step: float = STEP,
) -> tuple[Float[Tensor, " batch"], Adjoint]:
    """Compute one step of the adjoint.

    Args:
        model: the model. It is left with the parameters that it had before the step.
        groups: the optimizer's parameter groups.
        state: the values that the step read.
        update_rule: the optimizer's update rule.
        parts: the micro-batches of the step.
        later: sensitivity to the state after the step.
        method: `central` differences, for any kernel, or `jvp`, exact, for kernels with a forward
            mode.
        reseed: called before each pass, so that dropout repeats.
        step: of the central differences, relative to the parameters' norm.

    Returns:
        The score of every sample of the step, and the sensitivity to the state before it.

    Raises:
        SecateurError: the method is `jvp` and a kernel has no forward mode.
    """
    places = zip(later, state.states, state.gradients, state.hyper, strict=True)
    products = [update_rule.vjp(*place) for place in places]
    direction = groups.split([-by_gradient for _, by_gradient in products])
    with torch.no_grad():
        for name, value in groups.split([vectors[0] for vectors in state.states]).items():
            model.get_parameter(name).copy_(value)
    if method == "jvp":
        scores, change = _differentiate_forward(model, parts, direction, reseed)
    else:
        scores, change = _differentiate_centrally(model, parts, direction, reseed, step)
    earlier = [by_state for by_state, _ in products]
    for q, vector in zip(earlier, groups.join(change), strict=True):
        q[0] -= state.scale * vector
    return state.scale * scores, earlier


def _differentiate_centrally(
    model: nn.Module,
    parts: Sequence[LossPart],
    direction: Directions,
    reseed: Callable[[], Any],
    relative_step: float,
) -> tuple[Float[Tensor, " batch"], Directions]:
    """Return the derivatives along `direction` by central differences.

    Returns:
        The derivative of every sample's loss contribution, and of the gradient.
    """
    named = {name: p for name, p in model.named_parameters() if name in direction}
    length = torch.stack([d.norm() for d in direction.values()]).norm()
    size = torch.stack([p.detach().norm() for p in named.values()]).norm()
    if not length > 0:
        count = sum(len(part.weights) for part in parts)
        zeros = {name: torch.zeros_like(p) for name, p in named.items()}
        return torch.zeros(count, dtype=length.dtype), zeros
    step = float(relative_step * size / length)
    before = {name: p.detach().clone() for name, p in named.items()}
    passes = []
    for sign in (1, -1):
        with torch.no_grad():
            for name, parameter in named.items():
                parameter.copy_(before[name] + sign * step * direction[name])
        reseed()
        passes.append(_run_pass(model, parts, named))
    with torch.no_grad():
        for name, parameter in named.items():
            parameter.copy_(before[name])
    (up, gradients_up), (down, gradients_down) = passes
    change = {
        n: (a - b) / (2 * step) for n, a, b in zip(named, gradients_up, gradients_down, strict=True)
    }
    return (up - down) / (2 * step), change


def _run_pass(
    model: nn.Module, parts: Sequence[LossPart], named: Mapping[str, Tensor]
) -> tuple[Float[Tensor, " batch"], list[Tensor]]:
    """Return every sample's part of the loss, and the gradient of their sum."""
    values = []
    total = [torch.zeros_like(p) for p in named.values()]
    for part in parts:
        losses = part.losses(model)
        weighted = losses * part.weights.to(losses)
        gradients = torch.autograd.grad(
            weighted.sum(), list(named.values()), materialize_grads=True
        )
        # In float64, because the difference of two nearly equal losses follows.
        values.append(weighted.detach().double().cpu())
        total = [a + b for a, b in zip(total, gradients, strict=True)]
    return torch.cat(values), total


class _WeightedPart(nn.Module):
    """A part of the loss as a module, because `functional_call` replaces a module's parameters."""

    def __init__(self, model: nn.Module, part: LossPart) -> None:
        super().__init__()
        self.model = model
        self.part = part

    def forward(self) -> Tensor:
        losses = self.part.losses(self.model)
        return losses * self.part.weights.to(losses)


def _differentiate_forward(
    model: nn.Module, parts: Sequence[LossPart], direction: Directions, reseed: Callable[[], Any]
) -> tuple[Float[Tensor, " batch"], Directions]:
    """Return the same derivatives exactly, by forward over reverse differentiation."""
    values = []
    total = {name: torch.zeros_like(d) for name, d in direction.items()}
    reseed()
    for part in parts:
        change, moved = _part_jvp(_WeightedPart(model, part), direction)
        values.append(moved.detach().double().cpu())
        total = {name: t + change[f"model.{name}"] for name, t in total.items()}
    return torch.cat(values), total


def _part_jvp(module: _WeightedPart, direction: Directions) -> tuple[Directions, Tensor]:
    """Return the derivatives along `direction` of a part's gradient and of its weighted losses."""
    names = {f"model.{name}" for name in direction}
    parameters = {name: p.detach() for name, p in module.named_parameters() if name in names}
    along = {name: direction[name.removeprefix("model.")] for name in parameters}

    def loss(values: Directions) -> tuple[Tensor, Tensor]:
        weighted = torch.func.functional_call(module, values, ())
        return weighted.sum(), weighted

    gradient = torch.func.grad(loss, has_aux=True)
    try:
        derivatives: tuple[Directions, Tensor]
        derivatives = torch.func.jvp(gradient, (parameters,), (along,))[1]
    except (NotImplementedError, RuntimeError) as error:
        # torch has no class for this error, only its wording.
        if "forward" not in str(error):
            raise
        raise SecateurError(
            f"a kernel of the model has no forward mode ({str(error).splitlines()[0]}); set "
            f"`replay: {{method: central}}`"
        ) from error
    return derivatives


def _join_tensors(values: Sequence[Tensor | None], like: Sequence[Tensor]) -> Float[Tensor, " _"]:
    """Return copies of tensors as one vector, with zeros for each one that is None."""
    flat = [
        (torch.zeros_like(p) if v is None else v.detach()).flatten()
        for v, p in zip(values, like, strict=True)
    ]
    return torch.cat(flat)

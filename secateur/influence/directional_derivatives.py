"""Derivatives of a step's losses, and of their gradient, along a direction in the parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from secateur.errors import SecateurError
from secateur.influence.tape import Directions


@dataclass(frozen=True)
class LossPart:
    """A micro-batch.

    Attributes:
        losses: a forward pass that returns one loss per sample.
        weights: the weights of these in the step's loss.
    """

    losses: Callable[[nn.Module], Float[Tensor, " batch"]]
    weights: Float[Tensor, " batch"]


def differentiate_centrally(
    model: nn.Module,
    parts: Sequence[LossPart],
    direction: Directions,
    reseed: Callable[[], Any],
    relative_step: float,
) -> tuple[Float[Tensor, " batch"], Directions]:
    """Return the derivatives along `direction` by central differences.

    `relative_step` is relative to the parameters' norm. `reseed` is called before each pass.

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
        passes.append(run_pass(model, parts, named))
    with torch.no_grad():
        for name, parameter in named.items():
            parameter.copy_(before[name])
    (up, gradients_up), (down, gradients_down) = passes
    change = {
        n: (a - b) / (2 * step) for n, a, b in zip(named, gradients_up, gradients_down, strict=True)
    }
    return (up - down) / (2 * step), change


def run_pass(
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


def differentiate_forward(
    model: nn.Module, parts: Sequence[LossPart], direction: Directions, reseed: Callable[[], Any]
) -> tuple[Float[Tensor, " batch"], Directions]:
    """Return the same derivatives exactly, by forward over reverse differentiation.

    Raises:
        SecateurError: a kernel of the model has no forward mode.
    """
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

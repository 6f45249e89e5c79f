"""Room `secateur`: the linearised step of each known optimizer; one small class an optimizer.

A class states the optimizer's own update, element by element, on the state `(theta, slots...)`. Its Jacobian is taken
by automatic differentiation of that update, so there is no second formula to keep right (DESIGN, section 1).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from secateur.errors import SecateurError
from secateur.segment import Segment

Hyper = Mapping[str, Tensor]


class Linearised(ABC):
    """One optimizer's update, and the names of what it reads.

    Attributes:
        hyper: names of the settings recorded for each parameter group and step.
        slots: names of the optimizer's state tensors, after theta.
        linear: the update is linear in state and gradient, so its Jacobian needs neither and holds in any basis.
    """

    hyper: ClassVar[tuple[str, ...]]
    slots: tuple[str, ...]
    linear: ClassVar[bool] = False

    @abstractmethod
    def update(self, state: Float[Tensor, S * n], grad: Float[Tensor, "*n"], h: Hyper) -> Float[Tensor, S * n]:
        """The state after one step, from the state before it and the gradient received."""

    def settings(self, group: Mapping[str, Any], state: Mapping[str, Any]) -> list[float]:
        """The `hyper` row of a parameter group whose parameters' state is like `state` (empty before step one)."""
        values = dict(group, step=float(state.get("step", 0)) + 1)
        return [float(values[name]) for name in self.hyper]

    def jacobian(self, segment: Segment) -> tuple[Float[Tensor, "steps S S p"], Float[Tensor, "steps S p"]]:
        """Diagonals of `dF/ds` and `dF/dg` of every step, without the gradient's own dependence on theta.

        `[t, i, j]` is the derivative of slot i after step t with respect to slot j before it. Computed in float64.
        """
        width, count = segment.size, len(self.slots) + 1
        if self.linear:  # the derivative is the same at every point
            state = torch.zeros(count, segment.length, width, dtype=torch.float64)
            grad = torch.zeros(segment.length, width, dtype=torch.float64)
        else:  # theta itself enters only through weight decay, linearly
            grad = segment.gradients.double()
            state = torch.cat([torch.zeros_like(grad)[None], segment.slots.double().transpose(0, 1)])
        h = dict(zip(self.hyper, segment.hyper.double()[:, segment.groups].unbind(-1), strict=True))
        rows = [self._derivatives(state, grad, h, slot) for slot in range(count)]
        # 0 * inf where a slot and its gradient have both stayed zero: nothing flows there
        whole = torch.stack(rows).nan_to_num(nan=0.0)
        return whole[:, :-1].permute(2, 0, 1, 3), whole[:, -1].transpose(0, 1)

    def _derivatives(self, state: Tensor, grad: Tensor, h: Hyper, slot: int) -> Float[Tensor, "_ steps p"]:
        """Derivatives of one slot after the step by every slot before it, and by the gradient.

        The update works element by element, so the gradient of the sum is the derivative of each element.
        """
        state, grad = state.clone().requires_grad_(), grad.clone().requires_grad_()
        with torch.enable_grad():
            after = self.update(state, grad, h)[slot].sum()
            by_state, by_grad = torch.autograd.grad(after, (state, grad), materialize_grads=True)
        return torch.cat([by_state, by_grad[None]])


class SGD(Linearised):
    """`torch.optim.SGD`: weight decay, momentum, dampening, Nesterov, maximize."""

    hyper = ("lr", "momentum", "dampening", "weight_decay", "nesterov", "maximize", "first")
    linear = True

    def __init__(self, momentum: bool) -> None:
        self.slots = ("momentum_buffer",) if momentum else ()

    def settings(self, group: Mapping[str, Any], state: Mapping[str, Any]) -> list[float]:
        first = state.get("momentum_buffer") is None
        return [float(dict(group, first=first)[name]) for name in self.hyper]

    def update(self, state: Tensor, grad: Tensor, h: Hyper) -> Tensor:
        grad = grad * (1 - 2 * h["maximize"]) + h["weight_decay"] * state[0]
        if not self.slots:
            return torch.stack([state[0] - h["lr"] * grad])
        moving = h["momentum"] * state[1] + (1 - h["dampening"]) * grad
        buffer = h["first"] * grad + (1 - h["first"]) * moving
        buffer = torch.where(h["momentum"] == 0, grad, buffer)
        direction = buffer + h["nesterov"] * (grad + (h["momentum"] - 1) * buffer)
        return torch.stack([state[0] - h["lr"] * direction, buffer])


def linearise(optimizer: torch.optim.Optimizer) -> Linearised:
    """The linearised form of `optimizer`.

    Raises:
        SecateurError: its update is not one of those known here.
    """
    kind = type(optimizer)
    if kind is torch.optim.SGD:
        return SGD(momentum=any(group["momentum"] for group in optimizer.param_groups))
    raise SecateurError(
        f"the optimizer {kind.__module__}.{kind.__qualname__} is not known, and the recursion must follow the real "
        f"one; use torch.optim.SGD"
    )

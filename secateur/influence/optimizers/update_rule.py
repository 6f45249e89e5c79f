"""Room `secateur.optimizers`: an optimizer's step, linearised by automatic differentiation of its own update."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from secateur.influence.segment import Segment

Hyperparameters = Mapping[str, Tensor]


class UpdateRule(ABC):
    """One optimizer's update, element by element, and the names of what it reads.

    Attributes:
        hyper: names of the settings recorded for each parameter group and step.
        slots: names of the optimizer's state tensors, after theta.
        linear: the update is linear in state and gradient, so its Jacobian needs neither and holds in any basis.
    """

    hyper: ClassVar[tuple[str, ...]]
    slots: tuple[str, ...]
    linear: ClassVar[bool] = False

    @abstractmethod
    def update(
        self, state: Float[Tensor, "S *n"], grad: Float[Tensor, "*n"], h: Hyperparameters
    ) -> Float[Tensor, "S *n"]:
        """The state after one step, from the state before it and the gradient received."""

    def settings(self, group: Mapping[str, Any], state: Mapping[str, Any]) -> list[float]:
        """The `hyper` row of a parameter group whose parameters' state is like `state` (empty before step one)."""
        values = dict(group, step=float(state.get("step", 0)) + 1)
        if "betas" in values:
            values["beta1"], values["beta2"] = values["betas"]
        return [float(values[name]) for name in self.hyper]

    def jacobian(
        self, segment: Segment
    ) -> tuple[Float[Tensor, "steps S S p"], Float[Tensor, "steps S p"]]:
        """Diagonals of `dF/ds` and `dF/dg` of every step, without the gradient's own dependence on theta.

        `[t, i, j]` is the derivative of slot i after step t with respect to slot j before it. Computed in float64.
        """
        width, count = segment.size, len(self.slots) + 1
        if self.linear:  # the derivative is the same at every point
            state = torch.zeros(count, segment.length, width, dtype=torch.float64)
            grad = torch.zeros(segment.length, width, dtype=torch.float64)
        else:
            state, grad = segment.states.double().transpose(0, 1), segment.gradients.double()
        h = dict(zip(self.hyper, segment.hyper.double()[:, segment.groups].unbind(-1), strict=True))
        rows = []
        for slot in range(
            count
        ):  # the gradient of a slot's sum holds the derivative of each element
            direction = torch.zeros_like(state)
            direction[slot] = 1
            by_state, by_grad = self.vjp(direction, state, grad, h)
            rows.append(torch.cat([by_state, by_grad[None]]))
        whole = torch.stack(rows)
        return whole[:, :-1].permute(2, 0, 1, 3), whole[:, -1].transpose(0, 1)

    def vjp(
        self,
        later: Float[Tensor, "S *n"],
        state: Float[Tensor, "S *n"],
        grad: Float[Tensor, "*n"],
        h: Hyperparameters,
    ) -> tuple[Float[Tensor, "S *n"], Float[Tensor, "*n"]]:
        """`(dF/ds)^T later` and `(dF/dg)^T later`: a sensitivity to the state after the step, brought before it."""
        state, grad = state.clone().requires_grad_(), grad.clone().requires_grad_()
        with torch.enable_grad():
            after = (self.update(state, grad, h) * later).sum()
            by_state, by_grad = torch.autograd.grad(after, (state, grad), materialize_grads=True)
        # 0 * inf where a root is taken of a slot that, like its gradient, has stayed zero: nothing flows there
        return by_state.nan_to_num(nan=0.0), by_grad.nan_to_num(nan=0.0)

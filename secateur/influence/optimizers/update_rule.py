"""The base class of update rules: an optimizer's step and its derivatives."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from secateur.errors import SecateurError
from secateur.influence.segment import Segment

Hyperparameters = Mapping[str, Tensor]
ParameterGroups = Sequence[Mapping[str, Any]]


class UpdateRule(ABC):
    """One optimizer's update, element by element, and the names of the values that it reads.

    Attributes:
        hyper: names of the settings recorded for each parameter group and step.
        slots: names of the optimizer's state tensors, after theta.
        linear: whether the update is linear in state and gradient. Its Jacobian then needs neither,
            and holds in any basis.
        refused_attributes: options that an optimizer keeps outside its parameter groups, and that
            the rule does not follow.
    """

    hyper: ClassVar[tuple[str, ...]]
    slots: tuple[str, ...]
    linear: ClassVar[bool] = False
    refused_attributes: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def from_groups(cls, groups: ParameterGroups) -> UpdateRule:
        """Return the rule for an optimizer's options, which are in its parameter groups.

        Raises:
            SecateurError: the optimizer has an option that the rule does not follow.
        """
        return cls()

    @abstractmethod
    def update(
        self, state: Float[Tensor, "S *n"], grad: Float[Tensor, "*n"], h: Hyperparameters
    ) -> Float[Tensor, "S *n"]:
        """Return the state after one step.

        Args:
            state: theta and the slots before the step.
            grad: the gradient received.
            h: the settings that `hyper` names, in shapes that broadcast with `grad`.
        """

    @property
    def state_tensors(self) -> int:
        """State tensors per parameter: theta and the slots."""
        return 1 + len(self.slots)

    def initial_state(self, group: Mapping[str, Any], parameter: Tensor) -> dict[str, Tensor]:
        """Return what a new optimizer's state holds for a parameter before the first step.

        Args:
            group: the parameter's group.
            parameter: the parameter.
        """
        return {}

    def settings(self, group: Mapping[str, Any], state: Mapping[str, Any]) -> list[float]:
        """Return the `hyper` row of a parameter group.

        Args:
            group: the parameter group.
            state: the optimizer's state of one of its parameters; empty before the first step.
        """
        values = dict(group, step=float(state.get("step", 0)) + 1)
        if "betas" in values:
            values["beta1"], values["beta2"] = values["betas"]
        return [float(values[name]) for name in self.hyper]

    def jacobian(
        self, segment: Segment
    ) -> tuple[Float[Tensor, "steps S S p"], Float[Tensor, "steps S p"]]:
        """Return the diagonals of `dF/ds` and `dF/dg` of every step, in float64.

        The gradient's own dependence on theta is not included. A step changes nothing where its
        settings are not-a-number. Entry `[t, i, j]` is the derivative
        of slot i after step t with respect to slot j before it.

        Raises:
            SecateurError: the segment has other settings than the rule's.
        """
        if segment.hyper.shape[-1] != len(self.hyper):
            raise SecateurError(
                f"the segment has {segment.hyper.shape[-1]} settings per step and "
                f"{type(self).__name__} reads {len(self.hyper)}; another version of secateur "
                f"recorded it, so use that version or record the run again"
            )
        count = self.state_tensors
        if self.linear:
            # The derivative is the same at every point, so the segment has not recorded any.
            state = torch.zeros(count, segment.length, segment.size, dtype=torch.float64)
            grad = torch.zeros(segment.length, segment.size, dtype=torch.float64)
        else:
            state = segment.states.double().transpose(0, 1)
            grad = segment.gradients.double()
        hyper = segment.hyper.double()[:, segment.groups]
        # Such a parameter had no gradient, so the step left it and its slots as they were.
        skipped = hyper.isnan().any(-1)
        h = dict(zip(self.hyper, hyper.nan_to_num(0.0).unbind(-1), strict=True))
        rows = []
        for slot in range(count):
            # The update works element by element, so the gradient of a slot's sum holds the
            # derivative of each of its elements.
            direction = torch.zeros_like(state)
            direction[slot] = 1
            by_state, by_grad = self.vjp(direction, state, grad, h)
            by_state = torch.where(skipped, direction, by_state)
            by_grad = torch.where(skipped, 0.0, by_grad)
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
        """Return `(dF/ds)^T later` and `(dF/dg)^T later`.

        Args:
            later: a sensitivity to the state after the step.
            state: theta and the slots before the step.
            grad: the gradient received.
            h: the settings that `hyper` names.
        """
        # The squares of small gradients would vanish in half precision.
        dtype = torch.promote_types(state.dtype, torch.float32)
        state = state.to(dtype, copy=True).requires_grad_()
        grad = grad.to(dtype, copy=True).requires_grad_()
        with torch.enable_grad():
            after = (self.update(state, grad, h) * later).sum()
            by_state, by_grad = torch.autograd.grad(after, (state, grad), materialize_grads=True)
        # A root of a slot that has stayed zero differentiates to 0 * inf, if its gradient is zero
        # too, or to inf, if the gradient is so small that its square is zero. Nothing flows through
        # such an element.
        return by_state.nan_to_num(0.0, 0.0, 0.0), by_grad.nan_to_num(0.0, 0.0, 0.0)


def apply_weight_decay(theta: Tensor, grad: Tensor, h: Hyperparameters) -> tuple[Tensor, Tensor]:
    """Return parameters and gradient after weight decay.

    Decoupled weight decay changes the parameters, any other the gradient.
    """
    decoupled = h["decoupled_weight_decay"]
    decayed = theta * (1 - decoupled * h["lr"] * h["weight_decay"])
    return decayed, torch.where(decoupled == 0, add_weight_decay(theta, grad, h), grad)


def add_weight_decay(theta: Tensor, grad: Tensor, h: Hyperparameters) -> Tensor:
    """Return the gradient after weight decay that is added to it."""
    # A product with zero would not do: where the gradient's own derivative is infinite, at a slot
    # that has stayed zero, that of the product is not a number, and hides that of theta.
    return torch.where(h["weight_decay"] == 0, grad, grad + h["weight_decay"] * theta)


def refuse_option(groups: ParameterGroups, option: str) -> None:
    """Check that an option is off in every parameter group.

    Raises:
        SecateurError: it is on.
    """
    if any(group.get(option) for group in groups):
        raise SecateurError(
            f"the optimizer has {option}=True, which is not known, and the recursion must follow "
            f"the real update; turn {option} off"
        )


def fetch_numbers(mappings: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return parameter groups or states with each tensor of no dimensions as a number.

    Fused and capturable optimizers count steps on the GPU. Fetching every count by itself would
    wait for the GPU once per parameter, so all of a device are fetched together.
    """
    fetched = [dict(mapping) for mapping in mappings]
    places: dict[torch.device, list[tuple[dict[str, Any], str]]] = {}
    for mapping in fetched:
        for name, value in mapping.items():
            if isinstance(value, Tensor) and value.dim() == 0:
                places.setdefault(value.device, []).append((mapping, name))
    for own in places.values():
        numbers = torch.stack([mapping[name].detach() for mapping, name in own]).tolist()
        for (mapping, name), number in zip(own, numbers, strict=True):
            mapping[name] = number
    return fetched

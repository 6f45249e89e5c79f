"""The tape: the values that each optimizer step read, kept while training is run again."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from secateur.influence.optimizers import (
    UpdateRule,
    fetch_numbers,
    find_update_rule,
    unwrap_optimizer,
)

# One tensor per trainable parameter.
Directions = dict[str, Tensor]
# For each parameter group, a sensitivity to theta and to every slot.
Adjoint = list[Float[Tensor, "S _"]]


@dataclass(frozen=True)
class StepState:
    """The values that a step read, each parameter group's tensors as one vector.

    Attributes:
        states: theta and the optimizer's slots before the step, per group.
        gradients: the gradient received, per group.
        hyper: the update rule's settings, per group: one number, or one per element if they differ
            within the group.
        skipped: per group, which elements the step left unchanged because their parameter got no
            gradient; None if there are none.
        scale: the factor applied to the gradient after the backward pass (clipping by norm).
    """

    states: list[Float[Tensor, "S _"]]
    gradients: list[Float[Tensor, " _"]]
    hyper: Sequence[Mapping[str, Tensor]]
    skipped: list[Bool[Tensor, " _"] | None]
    scale: float


@runtime_checkable
class Steps(Protocol):
    """A stack of recorded steps: a list, or one that keeps them on disk."""

    def append(self, state: StepState, /) -> None:
        """Put a step on top of the stack."""

    def pop(self) -> StepState:
        """Take the top step from the stack."""


class Tape:
    """A record of the values that every step of an optimizer reads, while training is run again.

    Attributes:
        update_rule: the optimizer's update rule.
        steps: the recorded steps, the last one on top.
        groups: the optimizer's parameter groups.

    Args:
        model: the model.
        optimizer: the optimizer.
        scale: returns the factor applied to the coming step's gradient after the backward pass.
        steps: an empty stack for the steps; a list if None. Each step holds the parameters, the
            slots and the gradient, so a list grows by several models per step.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        scale: Callable[[], float] = lambda: 1.0,
        steps: Steps | None = None,
    ) -> None:
        optimizer = unwrap_optimizer(optimizer)
        self.update_rule: UpdateRule = find_update_rule(optimizer)
        self.steps: Steps = [] if steps is None else steps
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
        skipped = []
        for group in _nonempty_groups(self._optimizer):
            parameters = group["params"]
            own = [self._optimizer.state.get(p, {}) for p in parameters]
            slots = [
                _join_tensors([state.get(slot) for state in own], parameters)
                for slot in self.update_rule.slots
            ]
            states.append(torch.stack([_join_tensors(parameters, parameters), *slots]))
            gradients.append(_join_tensors([p.grad for p in parameters], parameters))
            hyper.append(self._settings(group, own))
            skipped.append(_skipped_elements(parameters))
        self.steps.append(StepState(states, gradients, hyper, skipped, self._scale()))

    def _settings(
        self, group: Mapping[str, Any], own: Sequence[Mapping[str, Any]]
    ) -> dict[str, Tensor]:
        """The settings of a group's elements. Adam counts the steps of each parameter."""
        parameters = group["params"]
        group, *own = fetch_numbers([group, *own])
        # The settings of a skipped parameter are not used, and would only make the group differ.
        rows = [
            self.update_rule.settings(group, state)
            for parameter, state in zip(parameters, own, strict=True)
            if parameter.grad is not None
        ] or [self.update_rule.settings(group, {})]
        # Half precision would turn a beta2 of 0.999 into 1.
        dtype = torch.promote_types(parameters[0].dtype, torch.float32)
        like = {"dtype": dtype, "device": parameters[0].device}
        if all(row == rows[0] for row in rows):
            return dict(zip(self.update_rule.hyper, torch.tensor(rows[0], **like), strict=True))
        all_rows = [self.update_rule.settings(group, state) for state in own]
        sizes = torch.tensor([p.numel() for p in parameters], device=parameters[0].device)
        columns = torch.tensor(all_rows, **like).repeat_interleave(sizes, 0).unbind(1)
        return dict(zip(self.update_rule.hyper, columns, strict=True))


class ParameterGroups:
    """An optimizer's parameters by group and name, and their tensors as one vector per group."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        names = {id(p): name for name, p in model.named_parameters()}
        self.members = [
            {names[id(p)]: p for p in group["params"]} for group in _nonempty_groups(optimizer)
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


def _nonempty_groups(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """The groups with parameters. A trainer may make a group that stays empty, with LoRA say."""
    return [group for group in optimizer.param_groups if group["params"]]


def _skipped_elements(parameters: Sequence[Tensor]) -> Bool[Tensor, " _"] | None:
    """Which elements of a group a step leaves unchanged, or None."""
    if all(p.grad is not None for p in parameters):
        return None
    return torch.cat(
        [torch.full_like(p, p.grad is None, dtype=torch.bool).flatten() for p in parameters]
    )


def _join_tensors(values: Sequence[Tensor | None], like: Sequence[Tensor]) -> Float[Tensor, " _"]:
    """Return copies of tensors as one vector, with zeros for each one that is None."""
    flat = [
        (torch.zeros_like(p) if v is None else v.detach()).flatten()
        for v, p in zip(values, like, strict=True)
    ]
    return torch.cat(flat)

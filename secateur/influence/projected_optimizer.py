"""An optimizer's gradient, state and settings, in the coefficients of a basis."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping

import torch
from jaxtyping import Float
from torch import Tensor, nn

from secateur.errors import SecateurError
from secateur.influence.basis import Basis
from secateur.influence.gradient_check import settings_rows
from secateur.influence.optimizers import UpdateRule, fetch_numbers
from secateur.influence.process_group import Ranks
from secateur.influence.sharded_tensors import check_sharding, is_sharded, own_part


class ProjectedOptimizer:
    """What the next step of an optimizer reads, in the coefficients of a basis.

    Attributes:
        groups: row of `settings()` that each of the p coefficients is updated with.

    Args:
        optimizer: the optimizer.
        update_rule: its update rule.
        parameters: the captured parameters by name.
        basis: the basis of the coefficients.
        ranks: the processes that the parameters may be divided among.

    Raises:
        SecateurError: the optimizer lacks a parameter, the basis cannot follow it, or parameters
            are divided among processes in another way than FSDP2 does.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        update_rule: UpdateRule,
        parameters: Mapping[str, nn.Parameter],
        basis: Basis,
        ranks: Ranks,
    ) -> None:
        check_sharding(parameters, ranks.size)
        self.groups = settings_rows(optimizer, parameters, basis)
        if not (update_rule.linear or basis.elementwise):
            raise SecateurError(
                f"{type(optimizer).__name__} treats every parameter by its own history, which a "
                f"kronecker basis cannot follow; use a basis of coordinates (in a plan "
                f"`basis: {{kind: coordinates}}`)"
            )
        self._optimizer = optimizer
        self._update_rule = update_rule
        self._parameters = parameters
        self._basis = basis
        self._ranks = ranks
        self._is_sharded = any(is_sharded(p) for p in parameters.values())

    def gradient(self, step: int) -> Float[Tensor, " p"]:
        """Return the gradient that the optimizer is about to use, zero where there is none.

        Args:
            step: the step, for the error message.

        Raises:
            SecateurError: no captured parameter has one.
        """
        gradients = {n: p.grad for n, p in self._parameters.items() if p.grad is not None}
        if not gradients:
            raise SecateurError(
                f"no captured parameter has a gradient at step {step}; call the optimizer's step "
                f"after the backward pass, and clear gradients after the step"
            )
        zeros = {n: torch.zeros_like(p) for n, p in self._parameters.items() if n not in gradients}
        gradient = self._project(gradients | zeros)
        # A fused optimizer divides by the scale of a GradScaler in its own step.
        scale = getattr(self._optimizer, "grad_scale", None)
        return gradient if scale is None else gradient / scale.to(gradient.device)

    def skipped(self, step: int) -> set[str]:
        """Return the parameters that the coming step leaves as they are: they have no gradient.

        That of a mixture's expert to which no token was sent, say. The optimizer changes neither
        them nor their state.

        Args:
            step: the step, for the error message.

        Raises:
            SecateurError: the basis mixes one with a parameter that the step does change.
        """
        names = {n for n, p in self._parameters.items() if p.grad is None}
        for block in () if self._basis.elementwise else self._basis.blocks:
            own = names.intersection(block.parameters)
            if own and own != set(block.parameters):
                raise SecateurError(
                    f"parameter {min(own)} got no gradient at step {step}, and a kronecker basis "
                    f"mixes it with others of its layer, which did; use a basis of coordinates (in "
                    f"a plan `basis: {{kind: coordinates}}`), or list it under `uncaptured`"
                )
        return names

    def has_gradient(self) -> bool:
        """Check whether any captured parameter has a gradient that is not zero.

        FSDP2 may keep gradients out of sight until a step's last micro-batch, so with it the answer
        is always yes.
        """
        if self._is_sharded:
            return True
        gradients = [p.grad for p in self._parameters.values()]
        return any(grad is not None and bool(grad.any()) for grad in gradients)

    def settings(self, skipped: Collection[str] = ()) -> list[list[float]]:
        """Return each captured parameter's settings, as the update rule's `hyper` names them.

        Args:
            skipped: parameters that the step leaves as they are. Their settings are not-a-number.
        """
        # The groups are looked up anew, because loading a state replaces them.
        groups = self._optimizer.param_groups
        parameters = self._parameters.values()
        states = [self._optimizer.state.get(p, {}) for p in parameters]
        numbers = fetch_numbers([*groups, *states])
        rows = {id(p): row for row, group in enumerate(groups) for p in group["params"]}
        settings = [
            self._update_rule.settings(numbers[rows[id(p)]], state)
            for p, state in zip(parameters, numbers[len(groups) :], strict=True)
        ]
        return [
            [math.nan] * len(row) if name in skipped else row
            for name, row in zip(self._parameters, settings, strict=True)
        ]

    def states(self) -> Float[Tensor, "S p"]:
        """Return theta and the optimizer's slots."""
        theta = self._project({n: p.detach() for n, p in self._parameters.items()})
        return torch.stack([theta, *(self._slot(name) for name in self._update_rule.slots)])

    def sensitivity(self, gradient: Float[Tensor, " p"]) -> Float[Tensor, " p"]:
        """Return `dF/dg` of the coming step at a gradient, in float64."""
        rule = self._update_rule
        hyper = torch.tensor(self.settings(), dtype=torch.float64)
        h = dict(zip(rule.hyper, hyper[self.groups].unbind(-1), strict=True))
        if rule.linear:
            # The Jacobian of a linear update does not depend on the state.
            state = torch.zeros(rule.state_tensors, self._basis.size, dtype=torch.float64)
        else:
            state = self.states().cpu().double()
        later = torch.zeros_like(state)
        later[0] = 1
        return rule.vjp(later, state, gradient.cpu().double(), h)[1]

    def _slot(self, name: str) -> Float[Tensor, " p"]:
        """Return one slot of the optimizer's state; zero before the first step."""
        tensors = {}
        for parameter_name, parameter in self._parameters.items():
            value = self._optimizer.state.get(parameter, {}).get(name)
            tensors[parameter_name] = torch.zeros_like(parameter) if value is None else value
        return self._project(tensors)

    def _project(self, tensors: Mapping[str, Tensor]) -> Float[Tensor, " p"]:
        """Return the coefficients of one tensor per parameter, whole or divided."""
        if not self._is_sharded:
            return self._basis.project_tensors(tensors)
        # A projection is linear, so every process projects its own part, one block at a time.
        first = self._ranks.is_first
        coefficients = []
        for i, block in enumerate(self._basis.blocks):
            parts = {name: own_part(tensors[name], first) for name in block.parameters}
            coefficients.append(self._basis.project_block(i, block.parts(parts)))
        return self._ranks.sum(torch.cat(coefficients))

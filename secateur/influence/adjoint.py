"""Replay: the adjoint of training itself, for a known target.

With `q` the sensitivity of the target's loss to the optimizer's state after a step, and
`u = -(dF/dg)^T q`, the score of every sample of the step is the derivative of its loss contribution
along `u`, and `q` before the step is `(dF/ds)^T q - H u`. Both come from two ordinary passes at
`theta +- eps u`. There is no projection, and every parameter counts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from secateur.influence.directional_derivatives import (
    LossPart,
    differentiate_centrally,
    differentiate_forward,
)
from secateur.influence.optimizers import UpdateRule
from secateur.influence.tape import Adjoint, Directions, ParameterGroups, StepState

# The step of the central differences, relative to the parameters' norm. If the loss is smooth, so
# wide a step changes nothing. If it has kinks (ReLU), the step crosses as many of them as a removal
# does; a shorter one would miss their curvature.
STEP = 1e-2
PULLED_ELEMENTS = 1 << 20  # elements that are pulled back through an update at a time


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
    products = _pull_back(later, state, update_rule)
    direction = groups.split([by_gradient.neg_() for _, by_gradient in products])
    _restore_parameters(model, groups, state)
    scores, change = _differentiate(model, parts, direction, method, reseed, step)
    earlier = [by_state for by_state, _ in products]
    for q, vector in zip(earlier, groups.join(change), strict=True):
        q[0] -= state.scale * vector
    return state.scale * scores, earlier


def _pull_back(
    later: Adjoint, state: StepState, update_rule: UpdateRule
) -> list[tuple[Float[Tensor, "S _"], Float[Tensor, " _"]]]:
    """Return each group's sensitivity through the update: to the state, and to the gradient."""
    products = []
    places = zip(later, state.states, state.gradients, state.hyper, state.skipped, strict=True)
    for sensitivity, states, gradient, hyper, skipped in places:
        by_state = torch.empty_like(states)
        by_gradient = torch.empty_like(gradient)
        # In parts, because an update and its derivative have a dozen temporary tensors.
        for start in range(0, len(gradient), PULLED_ELEMENTS):
            part = slice(start, start + PULLED_ELEMENTS)
            settings = {
                name: value[part] if value.dim() else value for name, value in hyper.items()
            }
            by_state[:, part], by_gradient[part] = update_rule.vjp(
                sensitivity[:, part], states[:, part], gradient[part], settings
            )
        if skipped is not None:
            # Nothing happened to these elements, so their sensitivity passes unchanged.
            by_state = torch.where(skipped, sensitivity, by_state)
            by_gradient = torch.where(skipped, 0.0, by_gradient)
        products.append((by_state, by_gradient))
    return products


def _restore_parameters(model: nn.Module, groups: ParameterGroups, state: StepState) -> None:
    """Give a model the parameters that it had before a step."""
    with torch.no_grad():
        for name, value in groups.split([vectors[0] for vectors in state.states]).items():
            model.get_parameter(name).copy_(value)


def _differentiate(
    model: nn.Module,
    parts: Sequence[LossPart],
    direction: Directions,
    method: str,
    reseed: Callable[[], Any],
    step: float,
) -> tuple[Float[Tensor, " batch"], Directions]:
    """Return the derivatives of the losses and of the gradient, by the chosen method."""
    if method == "jvp":
        return differentiate_forward(model, parts, direction, reseed)
    return differentiate_centrally(model, parts, direction, reseed, step)

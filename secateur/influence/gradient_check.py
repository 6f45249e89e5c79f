"""Checks of the captured contributions against the gradient that the optimizer received."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from secateur.errors import SecateurError
from secateur.influence.basis import Basis


def gradient_scale(
    total: Float[Tensor, " p"],
    received: Float[Tensor, " p"],
    basis: Basis,
    tolerance: float,
    step: int,
) -> float:
    """Return the factor applied to the gradient between the backward pass and the optimizer's step.

    Args:
        total: the sum of the contributions, in the coefficients of `basis`.
        received: the gradient that the optimizer is about to use.
        basis: the basis of the coefficients.
        tolerance: relative distance allowed between the two.
        step: the step, for the error message.

    Raises:
        SecateurError: the gradient is not a multiple of the contributions' sum.
    """
    power = float(total @ total)
    scale = float(received @ total) / power if power > 0 else 1.0
    # Rounding alone must not look like clipping.
    scale = 1.0 if abs(scale - 1) < tolerance / 10 else scale
    distance = float((received - scale * total).norm())
    length = float(received.norm())
    # Written with `not`, because a gradient that is not a number must fail too.
    if not distance <= tolerance * max(length, scale * power**0.5):
        distances = {
            block.name: float((received[span] - scale * total[span]).norm())
            for block, span in zip(basis.blocks, basis.spans, strict=True)
        }
        worst = max(distances, key=lambda name: distances[name])
        raise SecateurError(
            f"the contributions of step {step} do not add up to the gradient (relative distance "
            f"{distance / max(length, 1e-30):.2g}, most in {worst}); record every sample of the "
            f"batch, and let no other loss reach these parameters"
        )
    return scale


def settings_rows(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter], basis: Basis
) -> Int[Tensor, " p"]:
    """Return the parameter whose settings each coefficient of the basis is updated with.

    Settings are read per parameter, because parameters of one group may differ: Adam counts the
    steps of each, and a parameter without a gradient has no state.

    Returns:
        For each coefficient, the place of a parameter among `parameters`.

    Raises:
        SecateurError: the optimizer lacks a parameter, or a block's parameters are in several
            groups and the basis mixes them.
    """
    groups = {id(p): i for i, group in enumerate(optimizer.param_groups) for p in group["params"]}
    absent = [n for n, p in parameters.items() if id(p) not in groups]
    if absent:
        raise SecateurError(
            f"the optimizer does not train {absent[0]}; freeze it with requires_grad_(False)"
        )
    places = {name: place for place, name in enumerate(parameters)}
    if basis.elementwise:
        # float64 holds every place exactly; a model in half precision would not. FSDP2 divides
        # parameters among processes, but every process needs all places.
        filled = {
            name: torch.full(p.shape, places[name], dtype=torch.float64, device=p.device)
            for name, p in parameters.items()
        }
        return basis.project_tensors(filled).long().cpu()
    rows = torch.empty(basis.size, dtype=torch.int64)
    for block, span in zip(basis.blocks, basis.spans, strict=True):
        if len({groups[id(parameters[name])] for name in block.parameters}) > 1:
            raise SecateurError(
                f"block {block.name} has its weight and its bias in different parameter groups, "
                f"which a kronecker basis mixes; put them in one group, or use a basis of "
                f"coordinates (in a plan `basis: {{kind: coordinates}}`)"
            )
        rows[span] = places[block.parameters[0]]
    return rows

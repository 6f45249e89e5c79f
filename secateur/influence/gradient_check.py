"""Room `secateur`: whether what was captured agrees with what the optimizer received, and with whom it received it."""

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
    """What the gradient was multiplied by between the backward pass and the optimizer's step.

    Args:
        total: the contributions' sum, in the numbers of `basis`.
        received: the gradient that the optimizer is about to use.
        tolerance: relative distance allowed between the two.

    Raises:
        SecateurError: the gradient is no multiple of the contributions' sum.
    """
    power = float(total @ total)
    scale = float(received @ total) / power if power > 0 else 1.0
    scale = 1.0 if abs(scale - 1) < tolerance / 10 else scale
    distance, length = float((received - scale * total).norm()), float(received.norm())
    if not distance <= tolerance * max(length, scale * power**0.5):
        apart = {
            block.name: float((received[span] - scale * total[span]).norm())
            for block, span in zip(basis.blocks, basis.spans, strict=True)
        }
        raise SecateurError(
            f"the contributions of step {step} do not add up to the gradient (relative distance "
            f"{distance / max(length, 1e-30):.2g}, most in {max(apart, key=lambda name: apart[name])}); record every sample "
            f"of the batch, and let no other loss reach these parameters"
        )
    return scale


def parameter_groups(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter], basis: Basis
) -> Int[Tensor, " p"]:
    """The parameter group of every number of the basis.

    Raises:
        SecateurError: the optimizer lacks a parameter, or a block's parameters are in several groups and the basis
            mixes them.
    """
    groups = {id(p): i for i, group in enumerate(optimizer.param_groups) for p in group["params"]}
    absent = [n for n, p in parameters.items() if id(p) not in groups]
    if absent:
        raise SecateurError(
            f"the optimizer does not train {absent[0]}; freeze it with requires_grad_(False)"
        )
    if basis.elementwise:
        return (
            basis.project_tensors(
                {n: torch.full_like(p, groups[id(p)]) for n, p in parameters.items()}
            )
            .long()
            .cpu()
        )
    numbers = torch.empty(basis.size, dtype=torch.int64)
    for block, span in zip(basis.blocks, basis.spans, strict=True):
        own = {groups[id(parameters[name])] for name in block.parameters}
        if len(own) > 1:
            raise SecateurError(
                f"block {block.name} has its weight and its bias in different parameter groups, which a kronecker basis "
                f"cannot tell apart; put them in one group or set `basis: {{kind: coordinates}}`"
            )
        numbers[span] = own.pop()
    return numbers

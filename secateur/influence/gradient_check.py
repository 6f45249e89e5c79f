"""Checks of the captured contributions against the gradient that the optimizer received."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from secateur.errors import SecateurError
from secateur.influence.basis import Basis
from secateur.influence.captures import HALF_TYPES

# Relative distance allowed in a block that torch rounds coarsely.
COARSE_TOLERANCE = 0.5


def gradient_scale(
    total: Float[Tensor, " p"],
    received: Float[Tensor, " p"],
    basis: Basis,
    tolerance: float,
    rounding: float,
    step: int,
    coarse: Collection[int] = (),
) -> float:
    """Return the factor applied to the gradient between the backward pass and the optimizer's step.

    Args:
        total: the sum of the contributions, in the coefficients of `basis`.
        received: the gradient that the optimizer is about to use.
        basis: the basis of the coefficients.
        tolerance: relative distance allowed between the two.
        rounding: a factor that differs from 1 by less is 1.
        step: the step, for the error message.
        coarse: places of the blocks whose gradient torch itself rounds coarsely, as
            `coarse_blocks` returns them. The factor is that of the others, if there are any.

    Raises:
        SecateurError: the gradient is not a multiple of the contributions' sum.
    """
    fine = torch.ones_like(total, dtype=torch.bool)
    for place in coarse:
        fine[basis.spans[place]] = False
    if not bool(total[fine].any()):
        fine = torch.ones_like(fine)
    power = float(total[fine] @ total[fine])
    scale = float(received[fine] @ total[fine]) / power if power > 0 else 1.0
    scale = 1.0 if abs(scale - 1) < rounding else scale
    distances = received - scale * total
    distance = float(distances[fine].norm())
    length = float(received[fine].norm())
    # Written with `not`, because a gradient that is not a number must fail too.
    if not distance <= tolerance * max(length, scale * power**0.5):
        norms = {
            block.name: float((distances * fine)[span].norm())
            for block, span in zip(basis.blocks, basis.spans, strict=True)
        }
        worst = max(norms, key=lambda name: norms[name])
        raise SecateurError(
            f"the contributions of step {step} do not add up to the gradient (relative distance "
            f"{distance / max(length, 1e-30):.2g}, most in {worst}); record every sample of the "
            f"batch, and let no other loss reach these parameters"
        )
    for place in coarse:
        span = basis.spans[place]
        own = float(distances[span].norm())
        limit = COARSE_TOLERANCE * max(
            float(received[span].norm()), scale * float(total[span].norm())
        )
        if not own <= max(limit, tolerance * length):
            raise SecateurError(
                f"the gradient of {basis.blocks[place].name} at step {step} is not the sum of its "
                f"contributions, because on the CPU torch adds up an embedding's gradient in half "
                f"precision one token at a time, and frequent tokens lose most of theirs; keep the "
                f"parameters in float32, with autocast"
            )
    return scale


def coarse_blocks(model: nn.Module, basis: Basis) -> list[int]:
    """Return the places of the blocks whose gradient torch rounds coarsely.

    Those are embeddings in half precision on the CPU: their gradient is added up in it, one token
    at a time. If the partial sum has grown to 256 times an addend, bfloat16 loses the addend.
    """
    tables = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, nn.Embedding | nn.EmbeddingBag)
        for parameter in module.parameters(recurse=False)
        if parameter.dtype in HALF_TYPES and parameter.device.type == "cpu"
    }
    names = {n for n, p in model.named_parameters() if id(p) in tables}
    return [i for i, block in enumerate(basis.blocks) if names.intersection(block.parameters)]


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
        # parameters among processes, but every process needs all places. An expanded tensor holds
        # one element.
        filled = {
            name: torch.tensor(places[name], dtype=torch.float64, device=p.device).expand(p.shape)
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

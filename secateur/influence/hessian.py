"""Room `secateur`: the exact Hessian in the numbers of a basis, by vector products with double backward."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from secateur.influence.basis import Basis

PRODUCTS_AT_ONCE = 64


def compute_hessian(
    losses: Sequence[Callable[[], Float[Tensor, ""]]],
    model: nn.Module,
    basis: Basis,
    spans: Sequence[slice],
) -> Float[Tensor, " entries"]:
    """`P^T (grad grad sum loss) P` of each span, flattened one after the other; no parameter's `.grad` is touched.

    Args:
        losses: each runs a forward pass and returns a scalar; they are added up.
        spans: what is coupled; between spans the Hessian is taken as zero.
    """
    names = {name for block in basis.blocks for name in block.parameters}
    parameters = {name: p for name, p in model.named_parameters() if name in names}
    total = [torch.zeros(0)] * len(spans)
    with sdpa_kernel(SDPBackend.MATH):  # fused attention has no second derivative
        for number, loss in enumerate(losses):
            found = _of_one(loss, parameters, basis, spans)
            total = [a + b for a, b in zip(total, found, strict=True)] if number else found
    return torch.cat([part.flatten() for part in total])


def _of_one(
    loss: Callable[[], Tensor],
    parameters: Mapping[str, Tensor],
    basis: Basis,
    spans: Sequence[slice],
) -> list[Tensor]:
    """The Hessian of one loss, a matrix a span."""
    held = list(parameters.values())
    gradients = torch.autograd.grad(loss(), held, create_graph=True, materialize_grads=True)
    numbers = basis.project_tensors(dict(zip(parameters, gradients, strict=True)))
    reduce = torch.func.vmap(basis.project_tensors)
    matrices = []
    for span in spans:
        rows = []
        for part in torch.arange(span.start, span.stop, device=numbers.device).split(
            PRODUCTS_AT_ONCE
        ):
            directions = torch.zeros(
                len(part), basis.size, dtype=numbers.dtype, device=numbers.device
            )
            directions[torch.arange(len(part)), part] = 1
            products = _products(numbers, held, directions)
            rows.append(reduce(dict(zip(parameters, products, strict=True)))[:, span])
        matrices.append(torch.cat(rows).detach())
    return matrices


def _products(
    numbers: Float[Tensor, " p"], parameters: Sequence[Tensor], directions: Float[Tensor, "n p"]
) -> tuple[Tensor, ...]:
    """`d(directions . numbers)/d parameter`, one tensor a parameter with the directions first."""

    def product(outputs: Tensor, batched: bool) -> tuple[Tensor, ...]:
        return torch.autograd.grad(
            numbers,
            parameters,
            outputs,
            retain_graph=True,
            is_grads_batched=batched,
            materialize_grads=True,
        )

    try:
        return product(directions, True)
    except RuntimeError:  # a kernel whose second derivative takes no batches, such as GroupNorm's
        each = [product(direction, False) for direction in directions]
        return tuple(torch.stack(parts) for parts in zip(*each, strict=True))

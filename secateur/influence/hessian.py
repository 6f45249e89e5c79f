"""The exact Hessian in the coefficients of a basis, by vector products with double backward."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from secateur.influence.basis import Basis

# More products at a time are faster, and each needs the memory of one more backward pass.
PRODUCTS_AT_ONCE = 64


def compute_hessian(
    losses: Sequence[Callable[[], Float[Tensor, ""]]],
    model: nn.Module,
    basis: Basis,
    spans: Sequence[slice],
) -> Float[Tensor, " entries"]:
    """Return `P^T (grad grad sum loss) P` of each span, flattened and concatenated.

    No parameter's `.grad` is changed.

    Args:
        losses: each runs a forward pass and returns a scalar. They are added up.
        model: the model.
        basis: the basis of the coefficients.
        spans: the coefficients that are coupled. Between spans the Hessian is taken as zero.
    """
    names = {name for block in basis.blocks for name in block.parameters}
    parameters = {name: p for name, p in model.named_parameters() if name in names}
    total = [torch.zeros(0)] * len(spans)
    # Fused attention has no second derivative.
    with sdpa_kernel(SDPBackend.MATH):
        for number, loss in enumerate(losses):
            matrices = _loss_hessian(loss, parameters, basis, spans)
            total = [a + b for a, b in zip(total, matrices, strict=True)] if number else matrices
    return torch.cat([matrix.flatten() for matrix in total])


def _loss_hessian(
    loss: Callable[[], Tensor],
    parameters: Mapping[str, Tensor],
    basis: Basis,
    spans: Sequence[slice],
) -> list[Tensor]:
    """Return the Hessian of one loss, one matrix per span."""
    tensors = list(parameters.values())
    gradients = torch.autograd.grad(loss(), tensors, create_graph=True, materialize_grads=True)
    gradient = basis.project_tensors(dict(zip(parameters, gradients, strict=True)))
    project = torch.func.vmap(basis.project_tensors)
    matrices = []
    for span in spans:
        rows = []
        numbers = torch.arange(span.start, span.stop, device=gradient.device)
        for part in numbers.split(PRODUCTS_AT_ONCE):
            directions = gradient.new_zeros(len(part), basis.size)
            directions[torch.arange(len(part)), part] = 1
            products = _hessian_products(gradient, tensors, directions)
            rows.append(project(dict(zip(parameters, products, strict=True)))[:, span])
        matrices.append(torch.cat(rows).detach())
    return matrices


def _hessian_products(
    gradient: Float[Tensor, " p"], parameters: Sequence[Tensor], directions: Float[Tensor, "n p"]
) -> tuple[Tensor, ...]:
    """Return `d(directions . gradient)/d parameter` per parameter, one row per direction."""

    def differentiate(outputs: Tensor, batched: bool) -> tuple[Tensor, ...]:
        return torch.autograd.grad(
            gradient,
            parameters,
            outputs,
            retain_graph=True,
            is_grads_batched=batched,
            materialize_grads=True,
        )

    try:
        products = differentiate(directions, True)
        # Where the gradient does not depend on a parameter, the zeros have one row for all.
        each_shape = [(len(directions), *p.shape) for p in parameters]
        return tuple(x.expand(shape) for x, shape in zip(products, each_shape, strict=True))
    except RuntimeError:
        # The second derivative of some kernels, such as GroupNorm's, takes no batches.
        each = [differentiate(direction, False) for direction in directions]
        return tuple(torch.stack(parts) for parts in zip(*each, strict=True))

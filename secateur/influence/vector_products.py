"""Matrices in the coefficients of a basis, built from products with its unit vectors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from secateur.influence.basis import Basis

# More products at a time are faster, and each needs the memory of one more backward pass.
PRODUCTS_AT_ONCE = 64

# A product of some directions, `n p`, with a matrix: the columns `n p_j` of each parameter.
Product = Callable[[Float[Tensor, "n p"]], tuple[Tensor, ...]]


class ComputeMatrices(Protocol):
    """Evaluates a curvature within some spans, as `compute_hessian` does."""

    def __call__(
        self,
        losses: Sequence[Callable[[], Float[Tensor, ""]]],
        model: nn.Module,
        basis: Basis,
        spans: Sequence[slice],
    ) -> Float[Tensor, " entries"]:
        """Return one matrix per span, summed over losses, flattened and concatenated."""
        ...


def sum_matrices(
    losses: Sequence[Callable[[], Float[Tensor, ""]]],
    product_of: Callable[[Callable[[], Tensor], Mapping[str, Tensor]], Product],
    model: nn.Module,
    basis: Basis,
    spans: Sequence[slice],
) -> Float[Tensor, " entries"]:
    """Return `P^T M P` of each span, flattened and concatenated. `M` is a sum over losses.

    Args:
        losses: each runs a forward pass and returns a scalar.
        product_of: returns the product with one loss's matrix, for some parameters by name.
        model: the model.
        basis: the basis of the coefficients.
        spans: the coefficients that are coupled. Between spans the matrix is taken as zero.
    """
    names = {name for block in basis.blocks for name in block.parameters}
    parameters = {name: p for name, p in model.named_parameters() if name in names}
    total = [torch.zeros(0)] * len(spans)
    # Fused attention has no second derivative.
    with sdpa_kernel(SDPBackend.MATH):
        for number, loss in enumerate(losses):
            matrices = _matrices(product_of(loss, parameters), parameters, basis, spans)
            total = [a + b for a, b in zip(total, matrices, strict=True)] if number else matrices
    return torch.cat([matrix.flatten() for matrix in total])


def vector_products(
    outputs: Sequence[Tensor], inputs: Sequence[Tensor], vectors: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """Return `sum_j d(vectors_j . outputs_j) / d input` per input, one row per vector.

    Args:
        outputs: tensors with a graph, which is kept.
        inputs: tensors that it leads to, or not.
        vectors: for each output, `n` tensors of its shape.
    """
    count = len(vectors[0])

    def differentiate(of_each: Sequence[Tensor], batched: bool) -> tuple[Tensor, ...]:
        return torch.autograd.grad(
            outputs,
            inputs,
            of_each,
            retain_graph=True,
            is_grads_batched=batched,
            materialize_grads=True,
        )

    try:
        products = differentiate(vectors, True)
        # Where an output does not depend on an input, the zeros have one row for all.
        each_shape = [(count, *x.shape) for x in inputs]
        return tuple(x.expand(shape) for x, shape in zip(products, each_shape, strict=True))
    except RuntimeError:
        # The second derivative of some kernels, such as GroupNorm's, takes no batches.
        each = [differentiate([v[i] for v in vectors], False) for i in range(count)]
        return tuple(torch.stack(parts) for parts in zip(*each, strict=True))


def _matrices(
    product: Product, parameters: Mapping[str, Tensor], basis: Basis, spans: Sequence[slice]
) -> list[Tensor]:
    """Return `P^T M P` of each span."""
    like = basis.project_tensors({name: p.detach() for name, p in parameters.items()})
    project = torch.func.vmap(basis.project_tensors)
    matrices = []
    for span in spans:
        rows = []
        numbers = torch.arange(span.start, span.stop, device=like.device)
        for part in numbers.split(PRODUCTS_AT_ONCE):
            directions = like.new_zeros(len(part), basis.size)
            directions[torch.arange(len(part)), part] = 1
            products = product(directions)
            rows.append(project(dict(zip(parameters, products, strict=True)))[:, span].detach())
        matrices.append(torch.cat(rows))
    return matrices

"""The exact Hessian in the coefficients of a basis, by vector products with double backward."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from secateur.influence.basis import Basis
from secateur.influence.vector_products import Product, sum_matrices, vector_products


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

    def product_of(loss: Callable[[], Tensor], parameters: Mapping[str, Tensor]) -> Product:
        tensors = list(parameters.values())
        gradients = torch.autograd.grad(loss(), tensors, create_graph=True, materialize_grads=True)
        gradient = basis.project_tensors(dict(zip(parameters, gradients, strict=True)))
        return lambda directions: vector_products([gradient], tensors, [directions])

    return sum_matrices(losses, product_of, model, basis, spans)

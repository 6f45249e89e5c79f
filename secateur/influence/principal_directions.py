"""The directions in which samples' gradients vary most, for embeddings of few numbers."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from secateur.influence.moments import leading_eigenvectors

COLUMNS = 1 << 14  # coefficients whose products are summed at a time


def principal_directions(
    gradients: Float[Tensor, "n p"], count: int
) -> Float[Tensor, "p directions"]:
    """Return the leading right singular vectors of gradients that are scaled to length 1.

    Every sample counts alike, because a question may be about any. On a language model of 120,576
    parameters, 2,048 such directions hold .88 of a question's squared gradient, and the 2,048
    coordinates of most energy .43 (benchmarks/questions.py).

    Args:
        gradients: samples' gradients. They are scaled in place.
        count: at most this many directions. There are fewer if the gradients span fewer.
    """
    lengths = torch.linalg.vector_norm(gradients, dim=1, keepdim=True)
    gradients.div_(torch.where(lengths > 0, lengths, 1))
    products = torch.zeros(len(gradients), len(gradients), dtype=torch.float64)
    for columns in gradients.split(COLUMNS, 1):
        products += columns @ columns.T
    left = leading_eigenvectors(products, count)
    squares = ((products @ left) * left).sum(0)
    precision = torch.finfo(gradients.dtype).eps * len(gradients) ** 0.5
    spanned = squares > precision * squares.max()
    left = (left * torch.where(spanned, squares, 1).rsqrt())[:, spanned].to(gradients.dtype)
    return gradients.T @ left

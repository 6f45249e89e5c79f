"""One score per sample, from its vector and the gradients of a target's samples."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

# Rows of products held at a time, which bounds memory: each has one entry per target sample.
ROWS = 4096


def mean_alignment(
    vectors: Float[Tensor, "n p"], gradients: Float[Tensor, "m p"]
) -> Float[Tensor, " n"]:
    """Return each vector's product with the mean gradient, in float64."""
    return vectors.double() @ gradients.double().mean(0)


def nearest_alignment(
    vectors: Float[Tensor, "n p"], gradients: Float[Tensor, "m p"], temperature: float
) -> Float[Tensor, " n"]:
    """Return how far each vector's most aligned gradients outweigh its most opposed ones.

    With `c_j` its cosine with gradient j and T the temperature, the score is
    `T log sum_j exp(c_j / T) - T log sum_j exp(-c_j / T)`: the soft largest cosine plus the soft
    smallest. As T falls it approaches the sum of the largest and the smallest cosine. As T rises it
    approaches twice the mean cosine. A vector of zeros scores 0.
    """
    targets = _normalize_rows(gradients) / temperature
    parts = [_normalize_rows(part) @ targets.T for part in vectors.split(ROWS)]
    scores = [c.logsumexp(1) - (-c).logsumexp(1) for c in parts]
    return temperature * torch.cat(scores)


def _normalize_rows(vectors: Float[Tensor, "n p"]) -> Float[Tensor, "n p"]:
    """Return rows of length 1 in float64, however short they were. Zeros stay zeros."""
    return normalize(vectors.double(), dim=1, eps=1e-300)

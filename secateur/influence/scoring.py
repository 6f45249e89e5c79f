"""Room `secateur`: one score a sample from its vector and the gradients of a target's samples (DESIGN, section 4)."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

ROWS = 4096  # products that are held at once, for each target sample


def mean_alignment(
    vectors: Float[Tensor, "n p"], gradients: Float[Tensor, "m p"]
) -> Float[Tensor, " n"]:
    """Products with the mean gradient, in float64."""
    return vectors.double() @ gradients.double().mean(0)


def nearest_alignment(
    vectors: Float[Tensor, "n p"], gradients: Float[Tensor, "m p"], temperature: float
) -> Float[Tensor, " n"]:
    """How much nearer each vector is to the gradients most aligned with it than to those most opposed to it.

    With `c_j` its cosine with gradient j and T the temperature, `T log sum_j exp(c_j / T) - T log sum_j exp(-c_j / T)`:
    the soft largest cosine plus the soft smallest. As T falls it becomes the sum of the largest and the smallest cosine, as
    it rises twice the mean cosine. A vector of zeros scores 0.
    """
    targets = _unit(gradients) / temperature
    parts = [_unit(part) @ targets.T for part in vectors.split(ROWS)]
    scores = [c.logsumexp(1) - (-c).logsumexp(1) for c in parts]
    return temperature * torch.cat(scores)


def _unit(vectors: Float[Tensor, "n p"]) -> Float[Tensor, "n p"]:
    """Of length 1 in float64, however short they were; zeros stay."""
    return normalize(vectors.double(), dim=1, eps=1e-300)

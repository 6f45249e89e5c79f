"""Room `secateur`: the pull-back of a query through later stages, so that embeddings never have to be rewritten."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from secateur.influence.recursion import Transition


def query_at_stage_end(
    gradients: Float[Tensor, "m p"], spans: Sequence[slice], transition: Transition
) -> list[Float[Tensor, "m _"]]:
    """Loss gradients at a stage's end as a query for its embeddings: the optimizer's slots have no part in a loss."""
    queries = []
    for span, matrix in zip(spans, transition, strict=True):
        theta = gradients[:, span].to(matrix.dtype)
        queries.append(torch.nn.functional.pad(theta, (0, len(matrix) - theta.shape[1])))
    return queries


def pull_back(
    query: Sequence[Float[Tensor, "m _"]], transition: Transition, earlier_rows: Sequence[int]
) -> list[Float[Tensor, "m _"]]:
    """A query for a stage's embeddings as one for the stage before: `q_s = K^T q_{s+1}` (DESIGN, section 2).

    Args:
        transition: of the stage that `query` is for.
        earlier_rows: rows of the earlier stage's transition for each span: theta's alone where the optimizer was reset
            in between, all slots where its state was carried.
    """
    flat = [q @ k.flatten(1) for q, k in zip(query, transition, strict=True)]
    return [q[:, :rows] for q, rows in zip(flat, earlier_rows, strict=True)]

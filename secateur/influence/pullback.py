"""The pull-back of a query through later stages, so that embeddings are never rewritten."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from secateur.influence.recursion import Transition


def query_at_stage_end(
    gradients: Float[Tensor, "m p"], spans: Sequence[slice], slots: int
) -> list[Float[Tensor, "m _"]]:
    """Return loss gradients at a stage's end as a query for its embeddings, one matrix per span.

    A loss does not depend on the optimizer's slots, so their part of the query is zero.

    Args:
        slots: how many of the optimizer's state tensors, theta included, cross the stage's end.
    """
    queries = []
    for span in spans:
        theta = gradients[:, span]
        queries.append(torch.nn.functional.pad(theta, (0, (slots - 1) * theta.shape[1])))
    return queries


def pull_back(
    query: Sequence[Float[Tensor, "m _"]], transition: Transition, earlier_rows: Sequence[int]
) -> list[Float[Tensor, "m _"]]:
    """Turn a query for a stage's embeddings into one for the stage before: `q_s = K^T q_{s+1}`.

    Args:
        query: one matrix per span.
        transition: of the stage that `query` is for.
        earlier_rows: rows of the earlier stage's transition, for each span. These are theta's only
            if the optimizer was reset between the stages, and all slots' if its state was carried
            over.
    """
    flat = [q @ k.flatten(1) for q, k in zip(query, transition, strict=True)]
    return [q[:, :rows] for q, rows in zip(flat, earlier_rows, strict=True)]

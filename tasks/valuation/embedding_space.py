"""Questions as vectors that are multiplied with a stage's embeddings."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from secateur.influence.pullback import pull_back, query_at_stage_end
from secateur.tasks.results.valuation_results import (
    coupled_spans,
    is_reduced,
    read_directions,
    read_transition,
)
from secateur.tasks.run import Run
from secateur.tasks.valuation.dynamics import count_slots


def start_query(run: Run, gradients: Float[Tensor, "m p"]) -> list[Float[Tensor, "m _"]]:
    """Return loss gradients at a stage's end as sensitivities to the state there, per span."""
    slots = count_slots(run) if run.plan.optimizer.at_stage == "carry" else 1
    return query_at_stage_end(gradients, coupled_spans(run), slots)


def to_embedding_space(
    run: Run, stage: int, query: list[Float[Tensor, "m _"]]
) -> Float[Tensor, "m width"]:
    """Return sensitivities to the state at a stage's end in the numbers of its embeddings."""
    whole = torch.cat(query, 1)
    if not is_reduced(run):
        return whole
    return whole @ read_directions(run, stage).to(whole.dtype)


def share_in_embeddings(run: Run, stage: int, gradients: Float[Tensor, "m p"]) -> float:
    """Return the share of gradients' squared coefficients that a stage's embeddings hold."""
    if not is_reduced(run):
        return 1.0
    held = to_embedding_space(run, stage, start_query(run, gradients)).double().square().sum()
    return float(held / gradients.double().square().sum().clamp(min=torch.finfo().tiny))


def pull_back_query(
    run: Run, stage: int, query: list[Float[Tensor, "m _"]]
) -> list[Float[Tensor, "m _"]]:
    """Turn a query for a stage's embeddings into one for those of the stage before."""
    spans = coupled_spans(run)
    transition = read_transition(run.folder.stage(stage).embeddings)
    if is_reduced(run):
        whole = to_embedding_space(run, stage, query) @ transition[0][:, 0].to(query[0].dtype)
        return [whole[:, span] for span in spans]
    rows = [matrix.shape[1] for matrix in query]
    return pull_back(query, [matrix.to(query[0].dtype) for matrix in transition], rows)

"""Scores of every recorded use for a few questions, which are taken back through the ledgers.

Embeddings carry every use forward to the stage's end, at a cost of the coefficients' square. A
question that is carried backward to every use costs a scan of the ledgers, so that a basis may have
as many coefficients as the disk has room for.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from secateur.influence.recursion import Transition, walk_segment
from secateur.tasks.engine.progress import track
from secateur.tasks.results.valuation_results import coupled_spans
from secateur.tasks.run import Run
from secateur.tasks.valuation.dynamics import count_slots, plan_dynamics, read_segment


def pull_back_scores(
    run: Run, stages: list[int], gradients: Float[Tensor, "m p"]
) -> Iterator[tuple[int, Float[Tensor, "uses m"]]]:
    """Yield each stage and the scores of its uses, the last stage first.

    Uses are in the order of `scores.parquet`. Scores equal the products of the question with
    embeddings of all coefficients, up to rounding.

    Args:
        stages: consecutive stages.
        gradients: of the losses asked about, at the end of the last one.
    """
    query = _start(run, gradients)
    for stage in reversed(stages):
        ledgers = run.folder.stage(stage).segments()
        parts: list[Tensor] = []
        for ledger in track(reversed(ledgers), f"stage {stage}, pulling back", len(ledgers)):
            dynamics = plan_dynamics(run, read_segment(ledger))
            effects, query = walk_segment(dynamics, query)
            parts.append(torch.stack(effects).sum(0))
        yield stage, torch.cat(parts[::-1])
        if run.plan.optimizer.at_stage == "reset":
            # The stage began with an empty state, which the stage before has no part in.
            for matrix in query:
                matrix[:, 1:] = 0


def _start(run: Run, gradients: Float[Tensor, "m p"]) -> Transition:
    """The questions as a transition, a row for each.

    A loss does not depend on the optimizer's slots, so their part is zero.
    """
    matrices = []
    for span in coupled_spans(run):
        matrix = gradients.new_zeros(len(gradients), count_slots(run), span.stop - span.start)
        matrix[:, 0] = gradients[:, span]
        matrices.append(matrix.to(getattr(torch, run.plan.number_type)))
    return matrices

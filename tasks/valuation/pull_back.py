"""Scores of every recorded use for one question, which is taken back through the ledgers.

Embeddings carry every use forward to the stage's end, at a cost of the coefficients' square. One
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
from secateur.tasks.valuation.question import Question, question_gradient


def pull_back_scores(
    run: Run, stages: list[int], question: Question
) -> Iterator[tuple[int, Float[Tensor, " uses"]]]:
    """Yield each stage and the scores of its uses, the last stage first.

    Uses are in the order of `scores.parquet`. Scores equal the products of the question with
    embeddings of all coefficients, up to rounding.

    Args:
        stages: consecutive stages. The question is about the end of the last one.
    """
    gradient = question_gradient(run, stages[-1], question)
    query = _start(run, gradient)
    for stage in reversed(stages):
        ledgers = run.folder.stage(stage).segments()
        parts: list[Tensor] = []
        for ledger in track(reversed(ledgers), f"stage {stage}, pulling back", len(ledgers)):
            dynamics = plan_dynamics(run, read_segment(ledger))
            effects, query = walk_segment(dynamics, query)
            parts.append(torch.stack(effects).sum(0)[:, 0])
        yield stage, torch.cat(parts[::-1])
        if run.plan.optimizer.at_stage == "reset":
            # The stage began with an empty state, which the stage before has no part in.
            for matrix in query:
                matrix[:, 1:] = 0


def _start(run: Run, gradient: Float[Tensor, "1 p"]) -> Transition:
    """The question as a transition of one row. A loss does not depend on the optimizer's slots."""
    matrices = []
    for span in coupled_spans(run):
        matrix = gradient.new_zeros(1, count_slots(run), span.stop - span.start)
        matrix[:, 0] = gradient[:, span]
        matrices.append(matrix.to(getattr(torch, run.plan.number_type)))
    return matrices

"""Online selection: which candidates of a step lower a target's loss most.

Candidate `i` would move the parameters by `s_i`, its contribution times the optimizer's `dF/dg`
(`Recorder.step_sensitivity`). A step on the chosen ones changes the target's mean loss, whose
gradient is `q`, by about

    sum_i <q, s_i> + 1/2 sum_ij <s_i, H s_j>

`grad_align` (Wang et al., "Capturing the Temporal Dependence of Training Data Influence", ICLR
2025) keeps the first term: it chooses the candidates of largest `-<q, s_i>`. `greats` (Wang, Wu,
Song, Mittal, Jia, "GREATS: Online Selection of High-Quality Data for LLM Training in Every
Iteration", NeurIPS 2024) adds the pairs greedily: after every pick `j` each candidate's gain falls
by `<s_i, s_j>`. The Hessian is taken as the identity, as in the authors' code.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True)
class Choice:
    """A rule's choice among a step's candidates.

    Attributes:
        order: the chosen candidates, the first pick first.
        scores: the fall of the target's loss that each candidate's own step brings, to first order;
            NaN if the rule does not read it.
        gains: the values that the rule compared. A chosen candidate's is the one when it was
            picked, and the others' are the ones after the last pick.
    """

    order: Int[Tensor, " count"]
    scores: Float[Tensor, " candidates"]
    gains: Float[Tensor, " candidates"]


def select_grad_align(
    steps: Float[Tensor, "candidates p"], target: Float[Tensor, " p"], count: int
) -> Choice:
    """Choose the candidates whose own steps lower the target's loss most.

    Args:
        steps: the change of the parameters that each candidate would make, in the coefficients of a
            basis.
        target: gradient of the target's mean loss in the same coefficients.
        count: how many are chosen. Earlier candidates win ties.
    """
    scores = -(steps.double() @ target.double())
    return Choice(scores.argsort(descending=True, stable=True)[:count], scores, scores)


def select_greats(
    steps: Float[Tensor, "candidates p"], target: Float[Tensor, " p"], count: int
) -> Choice:
    """Choose candidates one by one. A pick lowers the gain of candidates with similar steps.

    Args:
        steps: as in `select_grad_align`.
        target: as in `select_grad_align`.
        count: how many are chosen. Earlier candidates win ties.
    """
    steps = steps.double()
    scores = -(steps @ target.double())
    pairs = steps @ steps.T
    gains = torch.empty_like(scores)
    remaining = scores.clone()
    order = []
    for _ in range(count):
        best = int(remaining.argmax())
        order.append(best)
        gains[best] = remaining[best]
        remaining -= pairs[best]
        # Minus infinity keeps a candidate from being picked again.
        remaining[best] = -math.inf
    gains = torch.where(remaining.isneginf(), gains, remaining)
    return Choice(torch.tensor(order, dtype=torch.int64), scores, gains)


def select_randomly(candidates: int, count: int, seed: int) -> Choice:
    """Choose candidates at random, as a control."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(candidates, generator=generator)[:count]
    unread = torch.full((candidates,), math.nan, dtype=torch.float64)
    return Choice(order, unread, unread)


SELECTION_RULES: dict[str, Callable[[Tensor, Tensor, int], Choice]] = {
    "grad_align": select_grad_align,
    "greats": select_greats,
}

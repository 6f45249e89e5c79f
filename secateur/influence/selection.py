"""Room `secateur`: online selection, which candidates of a step lower a target's loss most.

Candidate `i` would move the parameters by `s_i`, its contribution times the optimizer's `dF/dg` (`Recorder.step_sensitivity`), and a
step on the chosen ones changes the target's mean loss, whose gradient is `q`, by about

    sum_i <q, s_i> + 1/2 sum_ij <s_i, H s_j>

`grad_align` (Wang et al., "Capturing the Temporal Dependence of Training Data Influence", ICLR 2025)
keeps the first term: the candidates of largest `-<q, s_i>`. `greats` (Wang, Wu, Song, Mittal, Jia, "GREATS: Online Selection of
High-Quality Data for LLM Training in Every Iteration", NeurIPS 2024) adds the pairs greedily: after every pick `j` each candidate's gain
falls by `<s_i, s_j>`, the Hessian taken as the identity, as in the authors' code.
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
    """What a rule made of a step's candidates.

    Attributes:
        order: the chosen candidates, the first pick first.
        scores: the drop of the target's loss that each candidate's own step brings, to first order; NaN where the rule does
            not read it.
        gains: what the rule compared: of a chosen candidate when it was picked, of the others after the last pick.
    """

    order: Int[Tensor, " count"]
    scores: Float[Tensor, " candidates"]
    gains: Float[Tensor, " candidates"]


def select_grad_align(
    steps: Float[Tensor, "candidates p"], target: Float[Tensor, " p"], count: int
) -> Choice:
    """The candidates whose steps go furthest down the target's loss.

    Args:
        steps: what each candidate would add to the parameters, in the numbers of a basis.
        target: gradient of the target's mean loss in the same numbers.
        count: how many are chosen; earlier candidates win ties.
    """
    scores = -(steps.double() @ target.double())
    return Choice(scores.argsort(descending=True, stable=True)[:count], scores, scores)


def select_greats(
    steps: Float[Tensor, "candidates p"], target: Float[Tensor, " p"], count: int
) -> Choice:
    """The same one by one, each pick lessening the gain of candidates that go its way; arguments as in `grad_align`."""
    steps = steps.double()
    scores = -(steps @ target.double())
    pairs = steps @ steps.T
    gains, left, order = torch.empty_like(scores), scores.clone(), []
    for _ in range(count):
        best = int(left.argmax())
        order.append(best)
        gains[best] = left[best]
        left -= pairs[best]
        left[best] = -math.inf
    gains = torch.where(left.isneginf(), gains, left)
    return Choice(torch.tensor(order, dtype=torch.int64), scores, gains)


def select_randomly(candidates: int, count: int, seed: int) -> Choice:
    """Control: any of them, as the seed says."""
    drawn = torch.randperm(candidates, generator=torch.Generator().manual_seed(seed))[:count]
    unread = torch.full((candidates,), math.nan, dtype=torch.float64)
    return Choice(drawn, unread, unread)


SELECTION_RULES: dict[str, Callable[[Tensor, Tensor, int], Choice]] = {
    "grad_align": select_grad_align,
    "greats": select_greats,
}

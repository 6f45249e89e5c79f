"""The recursion that turns a segment's contributions into data value embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from secateur.influence.curvature import Curvature
from secateur.influence.optimizers import UpdateRule
from secateur.influence.segment import Segment

# One matrix per span. Rows are coefficients of the later state, columns
# `(slot, coefficient of the span)` of the earlier one.
Transition = list[Float[Tensor, "_ slots _"]]


@dataclass(frozen=True)
class Dynamics:
    """The rules by which a small change of the training state moves through a segment.

    The optimizer's step is `s <- F(s, g)`. The state `s` has `S` slots (theta first) of `p`
    coefficients, and `g` is the gradient that the optimizer received. `F` acts element by element,
    so each of its Jacobians is a diagonal for every pair of slots.

    Attributes:
        segment: the record of the steps.
        ds: diagonals of `dF/ds`: new slot, old slot.
        dg: diagonals of `dF/dg`.
        curvature: how each step's gradient changes with theta.
        spans: ranges of coefficients that the curvature couples. Between them nothing flows.
    """

    segment: Segment
    ds: Float[Tensor, "steps S S p"]
    dg: Float[Tensor, "steps S p"]
    curvature: Curvature
    spans: Sequence[slice]

    @staticmethod
    def from_segment(
        segment: Segment, update_rule: UpdateRule, curvature: Curvature, spans: Sequence[slice]
    ) -> Dynamics:
        """Return the dynamics of a segment, in the precision of its contributions."""
        ds, dg = update_rule.jacobian(segment)
        dtype = segment.contributions.dtype
        return Dynamics(segment, ds.to(dtype), dg.to(dtype), curvature, spans)


def identity_transition(
    spans: Sequence[slice], slots: int, dtype: torch.dtype, theta_only: bool = False
) -> list[Float[Tensor, "_ slots _"]]:
    """Return the transition that changes nothing.

    Args:
        spans: the coupled coefficients.
        slots: number of slots, theta included.
        dtype: of the matrices.
        theta_only: keep the rows of theta only, because the optimizer is reset afterwards.
    """
    transition = []
    for span in spans:
        size = span.stop - span.start
        eye = torch.eye(slots * size, dtype=dtype).view(-1, slots, size)
        transition.append(eye[:size].clone() if theta_only else eye)
    return transition


def walk_segment(
    dynamics: Dynamics, later: Transition
) -> tuple[list[Float[Tensor, "records _"]], list[Float[Tensor, "_ slots _"]]]:
    """Walk a segment backwards, from its last step to its first.

    If `later` is the identity, the first result is the segment's embeddings and the second its
    transition. If it has a single row (a query), they are the segment's scores and the query pulled
    back to the segment's start.

    `K` is `later` at the segment's end. Each step, with its contributions `C` and its curvature
    `H`, takes `A = -K dF/dg`, gives the effects `E = C A^T`, and replaces `K` by `K dF/ds - A H`
    (Wang et al., 2025, theorem 4, here for any optimizer state).

    Args:
        dynamics: of the segment.
        later: the transition from the segment's end to the point at which effects are read.

    Returns:
        For every span, the effect of removing each selected record (see `Segment.selected`), and
        the transition from the segment's start to the point at which effects are read.
    """
    results = [
        _walk_span(dynamics, span, matrix)
        for span, matrix in zip(dynamics.spans, later, strict=True)
    ]
    return [effects for effects, _ in results], [earlier for _, earlier in results]


def _walk_span(
    dynamics: Dynamics, span: slice, later: Float[Tensor, "rows slots b"]
) -> tuple[Float[Tensor, "records rows"], Float[Tensor, "rows slots b"]]:
    """Walk one span, and return its effects and its transition."""
    segment = dynamics.segment
    k = later.clone()
    ds = dynamics.ds[..., span].to(k.dtype)
    dg = dynamics.dg[..., span].to(k.dtype)
    contributions = segment.contributions[:, span].to(k.dtype).contiguous()
    effects = torch.empty(len(contributions), len(later), dtype=k.dtype)
    moved = _pairs_that_move(ds)
    for t in reversed(range(segment.length)):
        step = segment.first_step + t
        a = k[:, 0] * -dg[t, 0]
        for slot in range(1, dg.shape[1]):
            a.addcmul_(k[:, slot], dg[t, slot], value=-1)
        rows = segment.rows(step)
        e = torch.matmul(contributions[rows], a.T, out=effects[rows])
        _multiply_slots(k, ds[t], moved)
        response = dynamics.curvature.product(step, span, a, e)
        if response is not None:
            k[:, 0] -= response
    return effects[segment.selected], k


def _pairs_that_move(ds: Float[Tensor, "steps S S b"]) -> list[list[bool]]:
    """Return for each pair of slots whether the old one moves the new one at any step."""
    moved: list[list[bool]] = (ds != 0).any(3).any(0).tolist()
    return moved


def _multiply_slots(
    k: Float[Tensor, "rows slots b"], ds: Float[Tensor, "S S b"], moved: list[list[bool]]
) -> None:
    """Replace `k` by its product with a step's `dF/ds`. Pairs of slots without effect are skipped.

    With AdamW four of nine are: the slots do not depend on theta, nor on one another.
    """
    slots = range(len(ds))
    old = {
        slot: k[:, slot].clone()
        for slot in slots
        if any(moved[slot][other] for other in slots if other != slot)
    }
    for slot in slots:
        own = k[:, slot]
        own *= ds[slot, slot]
        for other in slots:
            if other != slot and moved[other][slot]:
                own.addcmul_(old[other], ds[other, slot])


def compose_transitions(later: Transition, earlier: Transition) -> list[Float[Tensor, "_ slots _"]]:
    """Return the transition over the steps of `earlier` and then those of `later`."""
    return [
        (a.flatten(1) @ b.flatten(1)).view(-1, *b.shape[1:])
        for a, b in zip(later, earlier, strict=True)
    ]


def carry_effects(
    effects: Sequence[Float[Tensor, "records _"]], later: Transition
) -> list[Float[Tensor, "records _"]]:
    """Carry a segment's embeddings through the transition of everything after it."""
    return [e @ k.flatten(1).T for e, k in zip(effects, later, strict=True)]


def propagate_effects(
    vectors: Float[Tensor, "n slots p"], dynamics: Dynamics, steps: Sequence[int]
) -> Float[Tensor, "n slots p"]:
    """Carry effects on the training state forward through consecutive steps of a segment."""
    segment = dynamics.segment
    for step in steps:
        t = step - segment.first_step
        moved = torch.einsum("ijp,njp->nip", dynamics.ds[t], vectors)
        contributions = segment.contributions[segment.rows(step)]
        for span in dynamics.spans:
            theta = vectors[:, 0, span]
            e = contributions[:, span] @ theta.T
            response = dynamics.curvature.product(step, span, theta, e)
            if response is not None:
                moved[:, :, span] += dynamics.dg[t][:, span] * response[:, None]
        vectors = moved
    return vectors


def short_horizon_effects(dynamics: Sequence[Dynamics], horizon: int) -> Float[Tensor, "records p"]:
    """Return the effects on theta of a segment's selected records, some steps after their use.

    Args:
        dynamics: of the segment whose records are meant, and of those that follow as far as the
            horizon may reach. If the stage ends before the horizon, effects are read at its end.
        horizon: the number of steps after the use, at least 1.
    """
    first = dynamics[0].segment
    effects = []
    for step in range(first.first_step, first.first_step + first.length):
        rows = first.rows(step)
        contributions = first.contributions[rows][first.selected[rows]]
        vectors = -dynamics[0].dg[step - first.first_step] * contributions[:, None]
        for part in dynamics:
            start = part.segment.first_step
            stop = start + part.segment.length
            steps = range(max(step + 1, start), min(step + horizon, stop))
            vectors = propagate_effects(vectors, part, steps)
        effects.append(vectors[:, 0])
    return torch.cat(effects)

"""Room `secateur`: the recursion that turns a segment's contributions into data value embeddings (DESIGN, section 2)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from secateur.influence.curvature import Curvature
from secateur.influence.optimizers import UpdateRule
from secateur.influence.segment import Segment

# One matrix a span: rows of the later state, columns (slot, number of the span) of the earlier one.
Transition = list[Float[Tensor, "_ slots _"]]


@dataclass(frozen=True)
class Dynamics:
    """How a perturbation moves through a segment: its record, the optimizer's Jacobian and the curvature.

    Attributes:
        ds: diagonals of `dF/ds`, `steps slots slots p`.
        dg: diagonals of `dF/dg`, `steps slots p`.
        spans: stretches of the basis that are coupled by the curvature; between them nothing flows.
    """

    segment: Segment
    ds: Float[Tensor, "steps S S p"]
    dg: Float[Tensor, "steps S p"]
    curvature: Curvature
    spans: Sequence[slice]

    @staticmethod
    def from_segment(
        segment: Segment, optimizer: UpdateRule, curvature: Curvature, spans: Sequence[slice]
    ) -> Dynamics:
        """The dynamics of a segment, in the precision of its contributions."""
        ds, dg = optimizer.jacobian(segment)
        dtype = segment.contributions.dtype
        return Dynamics(segment, ds.to(dtype), dg.to(dtype), curvature, spans)


def identity_transition(
    spans: Sequence[slice], slots: int, dtype: torch.dtype, theta_only: bool = False
) -> list[Float[Tensor, "_ slots _"]]:
    """The transition that changes nothing; with `theta_only` its rows are theta's alone (an optimizer reset after)."""
    whole = []
    for span in spans:
        size = span.stop - span.start
        eye = torch.eye(slots * size, dtype=dtype).view(-1, slots, size)
        whole.append(eye[:size].clone() if theta_only else eye)
    return whole


def walk_segment(
    dynamics: Dynamics, later: Transition
) -> tuple[list[Float[Tensor, "records _"]], list[Float[Tensor, "_ slots _"]]]:
    """Walks a segment backwards from `later`, the transition from its end to where effects are read.

    With the identity as `later` the first result is the segment's embeddings and the second its transition; with a
    single row (a query) they are its scores and the query pulled back to the segment's start. Per step, with
    `A = -K dF/dg`: `E = C A^T`, then `K <- K dF/ds - A H` (Wang et al., 2025, theorem 4; for any optimizer state).

    Returns:
        For every span the effect of removing each selected record, and the transition from the segment's start.
    """
    results = [
        _walk_span(dynamics, span, start) for span, start in zip(dynamics.spans, later, strict=True)
    ]
    return [effects for effects, _ in results], [earlier for _, earlier in results]


def _walk_span(dynamics: Dynamics, span: slice, later: Tensor) -> tuple[Tensor, Tensor]:
    """One span's walk: its effects `records rows` and its transition `rows slots b`."""
    segment, k = dynamics.segment, later.clone()
    ds, dg = dynamics.ds[..., span].to(k.dtype), dynamics.dg[..., span].to(k.dtype)
    contributions = segment.contributions[:, span].to(k.dtype).contiguous()
    effects = torch.empty(len(contributions), len(later), dtype=k.dtype)
    for t in reversed(range(segment.length)):
        step = segment.first_step + t
        a = -(k[:, 0] * dg[t, 0] if len(dg[t]) == 1 else (k * dg[t]).sum(1))
        rows = segment.rows(step)
        e = torch.matmul(contributions[rows], a.T, out=effects[rows])
        k = k.mul_(ds[t, 0]) if len(dg[t]) == 1 else torch.einsum("rib,ijb->rjb", k, ds[t])
        answer = dynamics.curvature.product(step, span, a, e)
        if answer is not None:
            k[:, 0] -= answer
    return effects[segment.selected], k


def compose_transitions(later: Transition, earlier: Transition) -> list[Float[Tensor, "_ slots _"]]:
    """The transition of `earlier` followed by `later`."""
    return [
        (a.flatten(1) @ b.flatten(1)).view(-1, *b.shape[1:])
        for a, b in zip(later, earlier, strict=True)
    ]


def carry_effects(
    effects: Sequence[Float[Tensor, "records _"]], later: Transition
) -> list[Float[Tensor, "records _"]]:
    """Carries a segment's embeddings through the transition of all that came after it."""
    return [e @ k.flatten(1).T for e, k in zip(effects, later, strict=True)]


def propagate_effects(
    vectors: Float[Tensor, "n slots p"], dynamics: Dynamics, steps: Sequence[int]
) -> Float[Tensor, "n slots p"]:
    """Carries effects forward through consecutive steps of a segment, for scores of a short horizon."""
    segment = dynamics.segment
    for step in steps:
        t = step - segment.first_step
        moved = torch.einsum("ijp,njp->nip", dynamics.ds[t], vectors)
        contributions = segment.contributions[segment.rows(step)]
        for span in dynamics.spans:
            theta = vectors[:, 0, span]
            answer = dynamics.curvature.product(step, span, theta, contributions[:, span] @ theta.T)
            if answer is not None:
                moved[:, :, span] += dynamics.dg[t][:, span] * answer[:, None]
        vectors = moved
    return vectors


def short_horizon_effects(dynamics: Sequence[Dynamics], horizon: int) -> Float[Tensor, "records p"]:
    """Effects on theta of the first segment's selected records, `horizon` steps after their use (at least 1).

    Args:
        dynamics: the segment whose records are meant, and those that follow as far as the horizon may reach; where the
            stage ends before it, effects are read at its end.
    """
    first = dynamics[0].segment
    found = []
    for step in range(first.first_step, first.first_step + first.length):
        rows = first.rows(step)
        kept = first.contributions[rows][first.selected[rows]]
        vectors = -dynamics[0].dg[step - first.first_step] * kept[:, None]
        for part in dynamics:
            start, stop = part.segment.first_step, part.segment.first_step + part.segment.length
            vectors = propagate_effects(
                vectors, part, range(max(step + 1, start), min(step + horizon, stop))
            )
        found.append(vectors[:, 0])
    return torch.cat(found)

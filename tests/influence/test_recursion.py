"""The recursion against explicit products of `(I - eta H)`, and segments against the whole run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from secateur.influence.basis import Basis
from secateur.influence.bindings import bind_layers
from secateur.influence.curvature import EmpiricalFisher
from secateur.influence.pullback import pull_back, query_at_stage_end
from secateur.influence.random_basis import random_kronecker_basis
from secateur.influence.recorder import Recorder
from secateur.influence.recursion import (
    Dynamics,
    carry_effects,
    compose_transitions,
    identity_transition,
    short_horizon_effects,
    walk_segment,
)
from secateur.influence.segment import Segment
from tests.influence.oracle import everything

STEPS = 12
BATCH = 6
ETA = 0.2
DECAY = 0.03


def record(
    parts: int, kronecker: bool = False, unrecorded: tuple[int, ...] = (), **options: Any
) -> tuple[list[Segment], Recorder, Basis]:
    """Record a short SGD run in `parts` segments."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3)).double()
    bindings = bind_layers(model)
    basis = (
        random_kronecker_basis(bindings, 2, 0, torch.float64) if kronecker else everything(bindings)
    )
    optimizer = torch.optim.SGD(model.parameters(), ETA, weight_decay=DECAY, **options)
    recorder = Recorder(model, optimizer, bindings, basis)
    x = torch.randn(STEPS, BATCH, 4).double()
    y = torch.randint(3, (STEPS, BATCH))
    segments = []
    for step in range(STEPS):
        optimizer.zero_grad()
        if step in unrecorded:
            functional.cross_entropy(model(x[step]), y[step]).backward()
        else:
            with recorder.batch(torch.arange(BATCH)):
                functional.cross_entropy(model(x[step]), y[step]).backward()
        optimizer.step()
        if (step + 1) % (STEPS // parts) == 0:
            segments.append(recorder.take_segment())
    return segments, recorder, basis


def dynamics(segment: Segment, recorder: Recorder, spans: list[slice]) -> Dynamics:
    return Dynamics.from_segment(
        segment, recorder.update_rule, EmpiricalFisher(segment, spans), spans
    )


def explicit(segment: Segment, spans: list[slice]) -> tuple[Tensor, Tensor]:
    """Return `eta c` times the explicit product of `(1 - eta wd) I - eta H`, and that product."""
    size = segment.size
    mask = torch.zeros(size, size, dtype=torch.float64)
    for span in spans:
        mask[span, span] = 1
    product = torch.eye(size, dtype=torch.float64)
    embeddings = torch.zeros_like(segment.contributions)
    for step in reversed(range(STEPS)):
        rows = segment.rows(step)
        c = segment.contributions[rows]
        embeddings[rows] = ETA * c @ product.T
        hessian = (
            (c.T @ torch.diag(1 / segment.weights[rows]) @ c) * mask
            if len(c)
            else torch.zeros(size, size).double()
        )
        product = product @ (
            (1 - ETA * DECAY) * torch.eye(size, dtype=torch.float64) - ETA * hessian
        )
    return embeddings, product


@pytest.mark.parametrize("kronecker", [False, True])
@pytest.mark.parametrize("coupled", [False, True])
@pytest.mark.parametrize("unrecorded", [(), (3, 4, 9)])
def test_embeddings_are_the_papers_formula(
    kronecker: bool, coupled: bool, unrecorded: tuple[int, ...]
) -> None:
    (segment,), recorder, basis = record(1, kronecker, unrecorded)
    spans = [slice(0, basis.size)] if coupled else list(basis.spans)
    actual, transition = walk_segment(
        dynamics(segment, recorder, spans), identity_transition(spans, 1, torch.float64)
    )
    expected, product = explicit(segment, spans)
    assert (torch.cat(actual, 1) - expected).norm() < 1e-8 * expected.norm()
    for span, matrix in zip(spans, transition, strict=True):
        assert (matrix[:, 0] - product[span, span]).norm() < 1e-8


@pytest.mark.parametrize("options", [{}, {"momentum": 0.8}, {"momentum": 0.8, "nesterov": True}])
@pytest.mark.parametrize("carried", [False, True])
def test_segments_compose_to_the_whole(options: dict[str, Any], carried: bool) -> None:
    (whole,), recorder, basis = record(1, **options)
    segments, *_ = record(4, **options)
    spans = list(basis.spans)
    slots = len(recorder.update_rule.slots) + 1
    start = identity_transition(spans, slots, torch.float64, theta_only=not carried)
    expected, transition = walk_segment(dynamics(whole, recorder, spans), start)
    later = start
    parts = []
    for segment in reversed(segments):
        own, k = walk_segment(
            dynamics(segment, recorder, spans), identity_transition(spans, slots, torch.float64)
        )
        parts.append(torch.cat(carry_effects(own, later), 1))
        later = compose_transitions(later, k)
    assert (torch.cat(parts[::-1]) - torch.cat(expected, 1)).abs().max() < 1e-8
    for a, b in zip(later, transition, strict=True):
        assert (a - b).abs().max() < 1e-8


@pytest.mark.parametrize("options", [{}, {"momentum": 0.8}])
def test_a_pulled_back_query_scores_as_the_rewritten_embeddings(options: dict[str, Any]) -> None:
    (whole,), recorder, basis = record(1, **options)
    (first, second), *_ = record(2, **options)
    spans = list(basis.spans)
    slots = len(recorder.update_rule.slots) + 1
    gradient = torch.randn(3, basis.size, dtype=torch.float64)
    all_at_end, _ = walk_segment(
        dynamics(whole, recorder, spans),
        identity_transition(spans, slots, torch.float64, theta_only=True),
    )
    early, k1 = walk_segment(
        dynamics(first, recorder, spans), identity_transition(spans, slots, torch.float64)
    )  # state carried over
    late, k2 = walk_segment(
        dynamics(second, recorder, spans),
        identity_transition(spans, slots, torch.float64, theta_only=True),
    )
    query = query_at_stage_end(gradient, spans, 1)
    earlier = pull_back(query, k2, [len(k) for k in k1])
    scores = torch.cat(
        [torch.cat(early, 1) @ torch.cat(earlier, 1).T, torch.cat(late, 1) @ torch.cat(query, 1).T]
    )
    assert (scores - torch.cat(all_at_end, 1) @ gradient.T).abs().max() < 1e-8


def test_one_row_scores_as_the_embeddings_do() -> None:
    (segment,), recorder, basis = record(1, momentum=0.8)
    spans = list(basis.spans)
    embeddings, k = walk_segment(
        dynamics(segment, recorder, spans),
        identity_transition(spans, 2, torch.float64, theta_only=True),
    )
    query = [torch.randn(1, s.stop - s.start, dtype=torch.float64) for s in spans]
    start = [torch.stack([q, torch.zeros_like(q)], 1) for q in query]
    scores, earlier = walk_segment(dynamics(segment, recorder, spans), start)
    torch.testing.assert_close(
        torch.cat(scores, 1),
        torch.cat([e @ q.T for e, q in zip(embeddings, query, strict=True)], 1),
    )
    for q, matrix, back in zip(query, k, earlier, strict=True):
        torch.testing.assert_close(back.flatten(1), q @ matrix.flatten(1))


@pytest.mark.parametrize("horizon", [1, 4, 100])
def test_a_short_horizon_reads_effects_some_steps_later(horizon: int) -> None:
    segments, recorder, basis = record(3, momentum=0.8)
    (whole,), *_ = record(1, momentum=0.8)
    spans = [slice(0, basis.size)]
    actual = [
        short_horizon_effects([dynamics(s, recorder, spans) for s in segments[n:]], horizon)
        for n in range(3)
    ]
    complete = dynamics(whole, recorder, spans)
    for step in range(STEPS):  # explicit: the state's Jacobians multiplied one by one
        state = torch.stack(
            [-complete.dg[step, i] * whole.contributions[whole.rows(step)] for i in range(2)], 1
        )
        for later in range(step + 1, min(step + horizon, STEPS)):
            c = whole.contributions[whole.rows(later)]
            hessian = c.T @ torch.diag(1 / whole.weights[whole.rows(later)]) @ c
            answer = state[:, 0] @ hessian
            state = torch.stack(
                [
                    sum(complete.ds[later, i, j] * state[:, j] for j in range(2))
                    + complete.dg[later, i] * answer
                    for i in range(2)
                ],
                1,
            )
        torch.testing.assert_close(torch.cat(actual)[whole.rows(step)], state[:, 0])

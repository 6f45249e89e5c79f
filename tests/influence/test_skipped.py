"""Parameters without a gradient in some steps, against derivatives of training with other weights.

A mixture's expert to which no sample is sent gets no gradient, and the optimizer leaves it as it
is: its weights, its momentum and its count of steps.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from secateur.errors import SecateurError
from secateur.influence.baselines import tracin_scores
from secateur.influence.bindings import bind_layers
from secateur.influence.curvature import EmpiricalFisher, Hessian
from secateur.influence.hessian import compute_hessian
from secateur.influence.kronecker_basis import KroneckerBasis
from secateur.influence.recorder import Recorder
from secateur.influence.recursion import Dynamics, identity_transition, walk_segment
from secateur.influence.segment import Segment
from tests.influence.oracle import everything

# The expert of each sample, by step. The last expert is not read by the first step, nor the first
# expert by the third.
EXPERTS = torch.tensor([[0, 1, 1, 1], [2, 0, 1, 2], [2, 2, 1, 1], [0, 0, 2, 0], [1, 1, 0, 1]])
STEPS, BATCH = EXPERTS.shape
Make = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]

OPTIMIZERS: dict[str, Make] = {
    "momentum": lambda p: torch.optim.SGD(p, 0.2, momentum=0.8, dampening=0.1, weight_decay=0.02),
    "adamw": lambda p: torch.optim.AdamW(p, 0.02, betas=(0.9, 0.95), eps=1e-3, weight_decay=0.1),
}


class Mixture(nn.Module):
    """A mixture of experts in a list. A sample's first entry names its expert."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x[:, 1:]).tanh()
        out = torch.zeros_like(hidden)
        for number, expert in enumerate(self.experts):
            chosen = (x[:, 0] == number).nonzero().flatten()
            if len(chosen):
                out = out.index_add(0, chosen, expert(hidden[chosen]).tanh())
        return self.head(out)


def network() -> Mixture:
    torch.manual_seed(0)
    return Mixture().double()


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(STEPS, BATCH, 4, generator=generator, dtype=torch.float64)
    y = torch.randint(3, (STEPS, BATCH), generator=generator)
    return torch.cat([EXPERTS[..., None], x], 2), y


def train(make: Make, step: int, place: int, share: float) -> Tensor:
    """Return the parameters at the end, with one sample of one step weighted less by a share."""
    model = network()
    x, y = data()
    optimizer = make(model.parameters())
    for t in range(STEPS):
        weights = torch.full((BATCH,), 1 / BATCH, dtype=torch.float64)
        weights[place] *= 1 - share * (t == step)
        optimizer.zero_grad()
        (functional.cross_entropy(model(x[t]), y[t], reduction="none") @ weights).backward()
        optimizer.step()
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def record(make: Make, skipped: int | None = None) -> tuple[Segment, Recorder]:
    """Record the training, with a step more that changes nothing before the step `skipped`."""
    model = network()
    x, y = data()
    optimizer = make(model.parameters())
    bindings = bind_layers(model)
    basis = everything(bindings)
    recorder = Recorder(model, optimizer, bindings, basis)
    for t in range(STEPS):

        def losses_of(rows: Tensor, t: int = t) -> Tensor:
            return functional.cross_entropy(model(x[t][rows]), y[t][rows], reduction="none")

        hessian = compute_hessian(
            [lambda: losses_of(torch.arange(BATCH)).mean()], model, basis, [slice(0, basis.size)]
        )
        recorder.record_hessian(hessian)
        optimizer.zero_grad()
        if t == skipped:
            with recorder.batch(torch.arange(BATCH), losses_of=losses_of):
                losses_of(torch.arange(BATCH)).mean().backward()
            optimizer.zero_grad()
            recorder.skip_step()
        with recorder.batch(torch.arange(BATCH), losses_of=losses_of):
            losses_of(torch.arange(BATCH)).mean().backward()
        optimizer.step()
    return recorder.take_segment(), recorder


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_embeddings_are_derivatives_of_training(name: str) -> None:
    make = OPTIMIZERS[name]
    with pytest.warns(UserWarning, match=r"experts\.2\.bias got no gradient .* \(2 parameters"):
        segment, recorder = record(make)
    spans = [slice(0, segment.size)]
    rule = recorder.update_rule
    dynamics = Dynamics.from_segment(segment, rule, Hessian(segment, spans), spans)
    (embeddings,), _ = walk_segment(
        dynamics, identity_transition(spans, rule.state_tensors, torch.float64)
    )
    names = [n for n, _ in network().named_parameters()]
    eps = 1e-5
    for step, place in ((0, 0), (1, 0), (1, 3), (2, 3), (3, 0), (4, 2)):
        lifted = recorder.basis.lift_to_tensors(embeddings[step * BATCH + place, : segment.size])
        actual = torch.cat([lifted[n].flatten() for n in names])
        up, down = (train(make, step, place, sign * eps) for sign in (1, -1))
        expected = (up - down) / (2 * eps)
        assert (actual - expected).norm() / expected.norm() < 1e-6, (step, place)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_that_changes_nothing_changes_no_embedding(name: str) -> None:
    """As one that a GradScaler leaves out."""
    embeddings = []
    for skipped in (None, 2):
        with pytest.warns(UserWarning, match="got no gradient"):
            segment, recorder = record(OPTIMIZERS[name], skipped)
        assert segment.length == STEPS + (skipped is not None)
        spans = [slice(0, segment.size)]
        rule = recorder.update_rule
        curvature = EmpiricalFisher(segment, spans)
        dynamics = Dynamics.from_segment(segment, rule, curvature, spans)
        identity = identity_transition(spans, rule.state_tensors, torch.float64)
        embeddings.append(walk_segment(dynamics, identity)[0][0])
    torch.testing.assert_close(embeddings[1], embeddings[0], rtol=1e-12, atol=1e-15)


def test_skipped_parameters_count_for_nothing_in_tracin() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        segment, recorder = record(OPTIMIZERS["adamw"])
    ones = torch.ones(1, segment.size, dtype=torch.float64)
    scores = tracin_scores(segment, recorder.update_rule, ones, ones)
    torch.testing.assert_close(scores[:, 0], 0.02 * segment.contributions.sum(1))


def test_half_a_layer_without_a_gradient_is_refused_by_a_basis_that_mixes_it() -> None:
    model = nn.Sequential(nn.Linear(4, 3)).double()
    bindings = bind_layers(model)
    factors = [(torch.eye(3).double(), torch.eye(5).double())]
    basis = KroneckerBasis(bindings.blocks, factors)
    recorder = Recorder(model, torch.optim.SGD(model.parameters(), 0.1), bindings, basis)
    model[0].weight.grad = torch.zeros(3, 4, dtype=torch.float64)
    assert recorder
    with pytest.raises(SecateurError, match=r"0\.bias got no gradient at step 0, and a kronecker"):
        recorder._optimizer.skipped(0)

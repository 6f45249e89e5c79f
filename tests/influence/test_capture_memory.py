"""Recording keeps no activation longer than autograd does."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from secateur.influence.bindings import bind_layers
from secateur.influence.hooks import sample_gradients
from secateur.influence.recorder import Recorder
from tests.influence.oracle import everything


class Activation:
    """Lives as long as the graph that it is part of."""


class Marked(torch.autograd.Function):
    """Passes a tensor on, and keeps an object in the graph."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mark: Activation) -> Tensor:
        ctx.mark = mark
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return gradients[0], None


class Network(nn.Module):
    """Two layers. The last graph's mark is in `mark`."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 4)
        self.norm = nn.GELU()
        self.second = nn.Linear(4, 3)
        self.scale = nn.PReLU()  # of no known family

    def forward(self, x: Tensor) -> Tensor:
        mark = Activation()
        self.mark = weakref.ref(mark)
        hidden: Any = Marked.apply(self.first(x), mark)
        return self.scale(self.second(self.norm(hidden)))


def test_a_recorded_steps_graph_is_freed() -> None:
    """A regression: the activations of every recorded step stayed in memory."""
    torch.manual_seed(0)
    model = Network()
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    recorder = Recorder(model, optimizer)
    x = torch.randn(6, 5)
    with recorder.batch(torch.arange(6)) as batch:
        losses = model(x).square().sum(1)
        batch.losses = losses
        losses.mean().backward()
    optimizer.step()
    del losses
    assert model.mark() is None


def test_the_graph_of_targets_is_freed() -> None:
    model = Network()
    bindings = bind_layers(model)
    x = torch.randn(6, 5)
    sample_gradients(lambda rows: model(x[rows]).sum(1), 6, bindings, everything(bindings))
    assert model.mark() is None


def test_a_graph_that_is_retained_can_be_differentiated_twice() -> None:
    """Contributions of both backward passes add up, as gradients do."""
    torch.manual_seed(0)
    model = Network()
    bindings = bind_layers(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    recorder = Recorder(model, optimizer, bindings, everything(bindings))
    x = torch.randn(6, 5)
    once, _ = sample_gradients(
        lambda rows: model(x[rows]).square().sum(1), 6, bindings, everything(bindings)
    )
    with recorder.batch(torch.arange(6)):
        loss = model(x).square().sum(1).mean()
        loss.backward(retain_graph=True)
        loss.backward()
    optimizer.step()
    torch.testing.assert_close(recorder.take_segment().contributions, once * 2 / 6)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("last", [nn.Linear(4, 3), nn.PReLU()], ids=["linear", "own forward"])
def test_checkpointed_layers_are_recomputed_while_hooks_look_on(
    reentrant: bool, last: nn.Module
) -> None:
    """A regression: torch missed tensors if the checkpointed part ended with a captured layer."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, 4), last)
    bindings = bind_layers(model)
    x = torch.randn(6, 5)

    def losses(rows: Tensor, checkpointed: bool) -> Tensor:
        inputs = x[rows].requires_grad_()
        if checkpointed:
            return checkpoint(model, inputs, use_reentrant=reentrant).square().sum(1)
        return model(inputs).square().sum(1)

    basis = everything(bindings)
    expected, _ = sample_gradients(lambda rows: losses(rows, False), 6, bindings, basis)
    found, _ = sample_gradients(lambda rows: losses(rows, True), 6, bindings, basis)
    torch.testing.assert_close(found, expected)

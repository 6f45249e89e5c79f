"""Recording a compiled model: the same contributions, and no compilation because of it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.nn import functional

from secateur.influence.recorder import Recorder
from secateur.influence.segment import Segment

X = torch.randn(8, 10, generator=torch.Generator().manual_seed(0))
Y = torch.randint(3, (8,), generator=torch.Generator().manual_seed(1))
ROWS = torch.arange(8)


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(10, 6)
        self.norm = nn.LayerNorm(6)
        self.last = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(self.first(x)).tanh())


Compile = Callable[[nn.Module, CompileCounter], nn.Module]


def wrap(model: nn.Module, counter: CompileCounter) -> nn.Module:
    compiled = torch.compile(model, backend=counter)
    assert isinstance(compiled, nn.Module)
    return compiled


def compile_in_place(model: nn.Module, counter: CompileCounter) -> nn.Module:
    model.compile(backend=counter)
    return model


class Loop:
    """A training loop whose model can be compiled at any time."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model: nn.Module = Network()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), 0.01)

    def losses(self, rows: Tensor) -> Tensor:
        return functional.cross_entropy(self.model(X[rows]), Y[rows], reduction="none")

    def train(self) -> None:
        self.optimizer.zero_grad()
        self.losses(ROWS).mean().backward()
        self.optimizer.step()

    def record(self) -> tuple[Segment, list[str]]:
        recorder = Recorder(self.model, self.optimizer, coefficients=64)
        for _ in range(3):
            self.optimizer.zero_grad()
            with recorder.batch(ROWS, losses_of=self.losses) as batch:
                losses = self.losses(ROWS)
                batch.losses = losses
                losses.mean().backward()
            self.optimizer.step()
        recorder.close()
        return recorder.take_segment(), list(recorder.parameters)


@pytest.mark.parametrize("compile_model", [wrap, compile_in_place])
def test_a_model_compiled_before_recording(compile_model: Compile) -> None:
    """A regression: a `Recorder` of a compiled model ended in a KeyError."""
    torch._dynamo.reset()
    counter = CompileCounter()
    loop, plain = Loop(), Loop()
    loop.model = compile_model(loop.model, counter)
    loop.train()
    plain.train()
    assert counter.frame_count == 1
    segment, names = loop.record()
    expected, plain_names = plain.record()
    assert names == plain_names
    torch.testing.assert_close(segment.contributions, expected.contributions)
    loop.train()
    assert counter.frame_count == 1  # neither recording nor the step after it compiled again


@pytest.mark.server
# torch.compile's own.
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")
def test_inductor_before_and_after_recording() -> None:
    """Real code is generated and compiled, and training is that of a plain model."""
    torch._dynamo.reset()
    loop, plain = Loop(), Loop()
    compiled = torch.compile(loop.model)
    assert isinstance(compiled, nn.Module)
    loop.model = compiled
    loop.train()
    plain.train()
    segment, _ = loop.record()
    expected, _ = plain.record()
    torch.testing.assert_close(segment.contributions, expected.contributions)
    with torch.compiler.set_stance("fail_on_recompile"):
        for _ in range(3):
            loop.train()
            plain.train()
    for own, other in zip(loop.model.parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(own, other)


@pytest.mark.parametrize("compile_model", [wrap, compile_in_place])
def test_a_model_compiled_after_recording(compile_model: Compile) -> None:
    torch._dynamo.reset()
    counter = CompileCounter()
    loop = Loop()
    loop.record()
    loop.model = compile_model(loop.model, counter)
    for _ in range(3):
        loop.train()
    assert counter.frame_count == 1

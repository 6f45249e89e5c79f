"""Replay against training with other weights, for every optimizer, layer family and method."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from secateur.errors import SecateurError
from secateur.influence.adjoint import step_back
from secateur.influence.directional_derivatives import LossPart
from secateur.influence.tape import StepState, Tape
from tests.influence.test_truth import OPTIMIZERS, Make

STEPS = 6
BATCH = 4
TARGETS = 5


class Attention(nn.Module):
    """Token embedding, fused attention, a head tied to the embedding, dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 8)
        self.qkv = nn.Linear(8, 24)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 7, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        q, k, v = (part.unsqueeze(1) for part in self.qkv(self.norm(x)).chunk(3, -1))
        x = x + functional.scaled_dot_product_attention(q, k, v, is_causal=True).squeeze(1)
        logits: Tensor = self.head(functional.dropout(x, 0.2, self.training))
        return logits.mean(1)


class Experts(nn.Module):
    """Two experts and an unused parameter. A batch uses one expert only."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.ones(3))
        self.experts = nn.ModuleList(nn.Linear(4, 6) for _ in range(2))
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        expert = self.experts[int(x[0, 0] > 0)]
        logits: Tensor = self.head(expert(x).tanh())
        return logits


MODELS: dict[str, Callable[[], tuple[nn.Module, tuple[int, ...] | None]]] = {
    "mlp": lambda: (
        nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.LayerNorm(6), nn.Linear(6, 3)),
        (4,),
    ),
    "convolution": lambda: (
        nn.Sequential(
            nn.Conv2d(1, 4, 3),
            nn.GroupNorm(2, 4),
            nn.GELU(),
            nn.BatchNorm2d(4).eval(),
            nn.Flatten(),
            nn.Linear(64, 3),
        ),
        (1, 6, 6),
    ),
    "attention": lambda: (Attention(), None),
    "experts": lambda: (Experts(), (4,)),
}


class Setting:
    """A model, its data, and training in which one sample's weight can be changed at one step."""

    def __init__(self, name: str, make: Make, dtype: torch.dtype = torch.float64) -> None:
        self.name = name
        self.make = make
        self.dtype = dtype
        _, shape = MODELS[name]()
        generator = torch.Generator().manual_seed(1)
        size = (STEPS * BATCH + TARGETS, *(shape or (5,)))
        self.x = (
            torch.randn(size, generator=generator).to(dtype)
            if shape
            else torch.randint(7, size, generator=generator)
        )
        self.y = torch.randint(3, (size[0],), generator=generator)

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        return MODELS[self.name]()[0].to(self.dtype)

    def losses(self, rows: Tensor, model: nn.Module) -> Tensor:
        return functional.cross_entropy(model(self.x[rows]), self.y[rows], reduction="none")

    def parts(self, step: int, removed: tuple[int, int, float] | None = None) -> list[LossPart]:
        """Return a step's two micro-batches, of unequal weights."""
        weights = torch.linspace(0.1, 0.4, BATCH, dtype=torch.float64)
        if removed and removed[0] == step:
            weights[removed[1]] *= 1 - removed[2]
        rows = torch.arange(step * BATCH, (step + 1) * BATCH)
        return [
            LossPart(partial(self.losses, r), w)
            for r, w in zip(rows.chunk(2), weights.chunk(2), strict=True)
        ]

    def train(self, removed: tuple[int, int, float] | None = None) -> tuple[nn.Module, Tape]:
        model = self.model()
        optimizer = self.make(p for p in model.parameters())
        scales = [0.5 if step == 2 else 1.0 for step in range(STEPS)]
        steps: list[StepState] = []
        tape = Tape(model, optimizer, lambda: scales[len(steps)], steps)
        for step in range(STEPS):
            torch.manual_seed(step)
            optimizer.zero_grad()
            for part in self.parts(step, removed):
                (part.losses(model) * part.weights.to(self.dtype)).sum().backward()
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter.grad.mul_(scales[step])
            optimizer.step()
        return model, tape

    def target(self, model: nn.Module) -> Tensor:
        model.eval()
        loss = self.losses(torch.arange(STEPS * BATCH, len(self.y)), model).mean()
        model.train()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        return loss

    def scores(self, method: str, difference: float = 1e-5) -> Tensor:
        model, tape = self.train()
        named = dict(model.named_parameters())
        parameters = list(named.values())
        gradients = torch.autograd.grad(self.target(model), parameters, materialize_grads=True)
        q = tape.groups.start_adjoint(
            dict(zip(named, gradients, strict=True)), len(tape.update_rule.slots)
        )
        all_scores: list[Tensor] = []
        for step in reversed(range(STEPS)):
            reseed = partial(torch.manual_seed, step)
            scores, q = step_back(
                model,
                tape.groups,
                tape.steps.pop(),
                tape.update_rule,
                self.parts(step),
                q,
                method,
                reseed,
                difference,
            )
            all_scores.insert(0, scores)
        return torch.stack(all_scores)


def recorded(tape: Tape) -> list[StepState]:
    """Return the steps of a tape that keeps them in a list."""
    return cast(list[StepState], tape.steps)


@pytest.mark.parametrize("method", ["central", "jvp"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", MODELS)
def test_scores_are_derivatives_of_training(name: str, optimizer: str, method: str) -> None:
    setting = Setting(name, OPTIMIZERS[optimizer])
    if (name, method) == ("attention", "jvp"):
        with pytest.raises(SecateurError, match="no forward mode"):
            setting.scores(method)
        return
    actual = setting.scores(method)
    eps = 1e-5
    for step, place in ((0, 1), (2, 0), (3, 3), (STEPS - 1, 2)):
        up, down = (
            float(setting.target(setting.train((step, place, s * eps))[0]).detach())
            for s in (1, -1)
        )
        assert float(actual[step, place]) == pytest.approx(
            (up - down) / (2 * eps), rel=1e-4, abs=1e-8
        )


def test_steps_leave_out_experts_and_an_empty_group_is_no_trouble() -> None:
    """The experts test skipped parameters only if a step skips one that was used before."""
    make = OPTIMIZERS["adamw"]
    _, tape = Setting("experts", lambda parameters: make([*parameters])).train()
    skipped = [step.skipped[0] for step in recorded(tape)]
    assert all(mask is not None and bool(mask[:3].all()) for mask in skipped)
    used = [~mask[3:] for mask in skipped if mask is not None]
    assert any(bool((early & ~late).any()) for early, late in pairwise(used))

    model = nn.Linear(2, 1)
    groups: list[dict[str, Any]] = [{"params": [model.weight, model.bias]}, {"params": []}]
    optimizer = torch.optim.AdamW(groups, 0.1)
    tape = Tape(model, optimizer)
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    assert [len(vector) for vector in recorded(tape)[0].gradients] == [3]
    assert tape.groups.split([torch.arange(3.0)])["bias"].tolist() == [2.0]


def test_float32_keeps_the_order() -> None:
    exact = Setting("mlp", OPTIMIZERS["adamw"]).scores("jvp").flatten()
    single = Setting("mlp", OPTIMIZERS["adamw"], torch.float32).scores("central").flatten()
    assert float(torch.corrcoef(torch.stack([exact, single]))[0, 1]) > 0.999


def test_half_precision_keeps_the_settings() -> None:
    """A beta2 of 0.999 is 1 in bfloat16, and then every score was zero."""
    make = lambda p: torch.optim.AdamW(p, 0.02)  # noqa: E731
    exact = Setting("mlp", make).scores("jvp").flatten()
    half = Setting("mlp", make, torch.bfloat16).scores("central", 1e-2).flatten()
    assert float(torch.corrcoef(torch.stack([exact, half.double()]))[0, 1]) > 0.98


def test_the_model_is_left_as_it_was_before_the_step() -> None:
    setting = Setting("mlp", OPTIMIZERS["adamw"])
    model, tape = setting.train()
    q = tape.groups.start_adjoint({n: torch.ones_like(p) for n, p in model.named_parameters()}, 2)
    step_back(model, tape.groups, recorded(tape)[0], tape.update_rule, setting.parts(0), q)
    for name, parameter in setting.model().named_parameters():
        assert torch.equal(dict(model.named_parameters())[name], parameter)


def test_the_default_step_changes_nothing_if_the_loss_is_smooth() -> None:
    setting = Setting("attention", OPTIMIZERS["adamw"])
    model, tape = setting.train()
    ones = {n: torch.ones_like(p) for n, p in model.named_parameters()}
    arguments = (
        model,
        tape.groups,
        recorded(tape)[3],
        tape.update_rule,
        setting.parts(3),
        tape.groups.start_adjoint(ones, 2),
        "central",
    )
    wide, _ = step_back(*arguments, partial(torch.manual_seed, 3))
    narrow, _ = step_back(*arguments, partial(torch.manual_seed, 3), 1e-5)
    assert float((wide - narrow).norm() / narrow.norm()) < 0.01

"""Recorded contributions against the gradient received, however the loss is reduced."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from secateur.errors import SecateurError
from secateur.influence.bindings import bind_layers
from secateur.influence.coordinate_basis import CoordinateBasis
from secateur.influence.gradient_check import settings_rows
from secateur.influence.memory_meter import measure_peak
from secateur.influence.random_basis import random_kronecker_basis
from secateur.influence.recorder import Recorder
from secateur.influence.segment import Segment
from tests.influence.oracle import everything, relative

IDS = torch.arange(8)


def setting(**options: Any) -> tuple[nn.Module, torch.optim.Optimizer, Recorder, Tensor, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, **options)
    bindings = bind_layers(model)
    recorder = Recorder(model, optimizer, bindings, everything(bindings))
    return model, optimizer, recorder, torch.randn(8, 5).double(), torch.randint(3, (8,))


def losses(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return functional.cross_entropy(model(x), y, reduction="none")


TOKENS = torch.tensor([1.0, 4, 2, 3, 5, 1, 2, 2], dtype=torch.float64)


@pytest.mark.parametrize(
    "weights",
    [torch.full((8,), 1 / 8), torch.ones(8), TOKENS / TOKENS.sum()],
    ids=["mean", "sum", "token_mean"],
)
@pytest.mark.parametrize("parts", [1, 4])
@pytest.mark.parametrize("clip", [None, 0.05])
def test_contributions_add_up(weights: Tensor, parts: int, clip: float | None) -> None:
    model, optimizer, recorder, x, y = setting()
    weights = weights.double()
    for rows in IDS.chunk(parts):
        with recorder.batch(rows, weights[rows]):
            (losses(model, x[rows], y[rows]) * weights[rows]).sum().backward()
    if clip:
        nn.utils.clip_grad_norm_(model.parameters(), clip)
    received = everything(bind_layers(model)).project_tensors(
        {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    )
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer.step()
    segment = recorder.take_segment()
    assert relative(segment.contributions.sum(0), received) < 1e-12
    assert segment.samples.tolist() == list(range(8))
    for i in range(8):  # each is its weight times the gradient of its own loss
        own = torch.autograd.functional.jacobian(
            lambda *p, i=i: losses_at(model, before, p, x[i : i + 1], y[i : i + 1]),
            tuple(before.values()),
        )
        gradient = everything(bind_layers(model)).project_tensors(
            dict(zip(before, own, strict=True))
        )
        assert relative(segment.contributions[i], segment.weights[i] * gradient) < 1e-10


def losses_at(
    model: nn.Module, names: dict[str, Tensor], values: tuple[Tensor, ...], x: Tensor, y: Tensor
) -> Tensor:
    return functional.cross_entropy(
        torch.func.functional_call(model, dict(zip(names, values, strict=True)), (x,)), y
    )


def test_an_unrecorded_sample_is_noticed() -> None:
    model, optimizer, recorder, x, y = setting()
    with recorder.batch(IDS[:6]):
        losses(model, x[:6], y[:6]).mean().backward()
    losses(model, x[6:], y[6:]).mean().backward()
    with pytest.raises(SecateurError, match="do not add up to the gradient"):
        optimizer.step()


def test_a_step_without_gradients_is_refused() -> None:
    _, optimizer, recorder, *_ = setting()
    assert recorder
    with pytest.raises(SecateurError, match="no captured parameter has a gradient at step 0"):
        optimizer.step()


def test_a_batch_of_another_size_is_refused() -> None:
    model, _, recorder, x, y = setting()
    with (
        pytest.raises(SecateurError, match="saw a batch of 8 where 5 samples were announced"),
        recorder.batch(IDS[:5]),
    ):
        losses(model, x, y).mean().backward()


def test_a_parameter_the_optimizer_lacks_is_named() -> None:
    model = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3))
    bindings = bind_layers(model)
    with pytest.raises(SecateurError, match=r"does not train 1\.weight"):
        Recorder(model, torch.optim.SGD(model[0].parameters(), 0.1), bindings, everything(bindings))


ONES = torch.ones(2, 5).double(), torch.zeros(2, dtype=torch.int64)


class WithUnused(nn.Module):
    """A network whose first parameter never gets a gradient, if `unused` is set."""

    def __init__(self, unused: bool) -> None:
        super().__init__()
        if unused:
            self.mask_token = nn.Parameter(torch.zeros(3))
        torch.manual_seed(0)
        self.first = nn.Linear(5, 4)
        self.second = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.second(self.first(x).tanh())
        return logits


@pytest.mark.parametrize(
    "make",
    [
        lambda parameters: torch.optim.AdamW(parameters, 0.05),
        lambda parameters: torch.optim.SGD(parameters, 0.2, momentum=0.9),
    ],
    ids=["adamw", "momentum"],
)
def test_settings_are_read_per_parameter(make: Callable[..., torch.optim.Optimizer]) -> None:
    """They were read off the first parameter of a group, which may have no state: Adam's step count
    was 1 at every step, and embeddings were wrong by a factor of 6."""
    segments = []
    for unused in (False, True):
        model = WithUnused(unused).double()
        bindings = bind_layers(model, ["mask_token"] if unused else [])
        recorder = Recorder(model, optimizer := make(model.parameters()), bindings)
        torch.manual_seed(1)
        for _ in range(4):
            x, y = torch.randn(8, 5).double(), torch.randint(3, (8,))
            optimizer.zero_grad()
            with recorder.batch(range(8)):
                losses(model, x, y).mean().backward()
            optimizer.step()
        segments.append(recorder.take_segment())
    plain, other = segments
    for name in ("hyper", "groups", "states", "contributions"):
        torch.testing.assert_close(getattr(plain, name), getattr(other, name))


def test_parameters_of_a_group_that_have_taken_different_numbers_of_steps() -> None:
    model = WithUnused(unused=False).double()
    optimizer = torch.optim.AdamW(model.parameters(), 0.05)
    model.first(torch.ones(1, 5).double()).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    bindings = bind_layers(model)
    recorder = Recorder(model, optimizer, bindings, everything(bindings))
    with recorder.batch(range(2)):
        losses(model, *ONES).mean().backward()
    optimizer.step()
    segment = recorder.take_segment()
    counts = segment.hyper[0, :, recorder.update_rule.hyper.index("step")]
    first = slice(0, model.first.weight.numel() + model.first.bias.numel())
    assert counts[segment.groups[first]].unique().tolist() == [2.0]
    assert counts[segment.groups[first.stop :]].unique().tolist() == [1.0]


def test_finding_each_coefficients_parameter_takes_no_memory_of_the_models_size() -> None:
    model = nn.Sequential(nn.Linear(1000, 1000), nn.Linear(1000, 10))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    bindings = bind_layers(model)
    parameters = bindings.parameters()
    entries = [torch.tensor([0, 1000, 1001]), torch.tensor([2])]
    basis = CoordinateBasis(bindings.blocks, entries)
    # The third coefficient, at column 1,000 of 1,001, is the first bias.
    expected = [0, 1, 0, 2]
    assert settings_rows(optimizer, parameters, basis).tolist() == expected
    assert measure_peak(lambda: settings_rows(optimizer, parameters, basis)) < 10_000


def test_an_empty_parameter_group_is_no_trouble() -> None:
    """Trainers that split parameters by weight decay make one, if LoRA leaves no bias to train."""
    model = nn.Linear(5, 3).double()
    groups: list[dict[str, Any]] = [{"params": [model.weight, model.bias]}, {"params": []}]
    optimizer = torch.optim.AdamW(groups, 0.1)
    recorder = Recorder(model, optimizer)
    with recorder.batch(range(2)):
        losses(model, *ONES).mean().backward()
    optimizer.step()
    assert recorder.take_segment().length == 1


def test_groups_that_split_a_block_need_coordinates() -> None:
    model = nn.Linear(5, 4)
    bindings = bind_layers(model)
    groups: list[dict[str, Any]] = [
        {"params": [model.weight], "weight_decay": 0.1},
        {"params": [model.bias]},
    ]
    with pytest.raises(SecateurError, match="different parameter groups"):
        Recorder(
            model,
            torch.optim.SGD(groups, 0.1),
            bindings,
            random_kronecker_basis(bindings, 2, 0, torch.float32),
        )
    Recorder(model, torch.optim.SGD(groups, 0.1), bindings, everything(bindings))


def test_a_step_without_a_batch_has_no_records() -> None:
    model, optimizer, recorder, x, y = setting()
    for step in range(3):
        optimizer.zero_grad()
        if step == 1:
            with recorder.batch(IDS, window=-1, stride=3.0):
                losses(model, x, y).mean().backward()
        else:
            losses(model, x, y).mean().backward()
        optimizer.step()
    segment = recorder.take_segment()
    assert segment.strides.tolist() == [0, 3, 0]
    assert segment.steps.unique().tolist() == [1]
    assert not segment.selected.any()


def test_a_forward_pass_outside_the_block_is_noticed() -> None:
    """A regression: nothing was captured, and a sum of zero agreed with any gradient."""
    model, optimizer, recorder, x, y = setting()
    loss = losses(model, x, y).mean()
    with recorder.batch(IDS):
        loss.backward()
    with pytest.raises(SecateurError, match="do not add up to the gradient"):
        optimizer.step()


def test_a_gradient_that_is_not_a_number_is_noticed() -> None:
    model, optimizer, recorder, x, y = setting()
    with recorder.batch(IDS):
        (losses(model, x, y).mean() * float("nan")).backward()
    with pytest.raises(SecateurError, match="do not add up to the gradient"):
        optimizer.step()


def record_steps(how: str) -> dict[str, Tensor]:
    """Record two clipped steps, each with its backward pass before it or in a closure."""
    model, optimizer, recorder, x, y = setting(momentum=0.5)

    def backward() -> Tensor:
        optimizer.zero_grad()
        with recorder.batch(IDS):
            loss = losses(model, x, y).mean()
            loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.05)
        return loss

    for _ in range(2):
        if how == "before":
            backward()
            optimizer.step()
        elif how == "closure":
            optimizer.step(backward)  # type: ignore[arg-type]
        else:
            optimizer.step(closure=backward)  # type: ignore[arg-type]
    return recorder.take_segment().tensors()


@pytest.mark.parametrize("how", ["closure", "keyword"])
def test_a_step_with_a_closure_is_recorded_after_it(how: str) -> None:
    """A regression with Lightning: the gradients read were those of the step before."""
    expected = record_steps("before")
    for name, tensor in record_steps(how).items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("parts", [1, 4])
def test_weights_are_read_from_losses_in_the_graph(parts: int) -> None:
    model, optimizer, recorder, x, y = setting()
    for rows in IDS.chunk(parts):
        with recorder.batch(rows) as batch:
            each = functional.cross_entropy(model(x[rows]), y[rows], reduction="none")
            batch.losses = each
            (each * TOKENS[rows]).sum().div(TOKENS.sum()).backward()
    optimizer.step()
    segment = recorder.take_segment()
    torch.testing.assert_close(segment.weights, TOKENS / TOKENS.sum())
    with (
        pytest.raises(SecateurError, match=r"losses of shape \(1,\) for 8 samples"),
        recorder.batch(IDS) as batch,
    ):
        batch.losses = torch.ones(1)


def test_a_batch_without_a_step_is_forgotten() -> None:
    """A regression: a scaler that meets an overflow takes no step, and its batch counted twice."""
    model, optimizer, recorder, x, y = setting()
    for rows in (IDS[:5], IDS[5:]):
        optimizer.zero_grad()
        with recorder.batch(rows):
            losses(model, x[rows], y[rows]).mean().backward()
    optimizer.step()
    assert recorder.take_segment().samples.tolist() == [5, 6, 7]


class Placed(nn.Module):
    """A model whose positions are looked up once for the whole batch."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(7, 4)
        self.places = nn.Embedding(6, 4)
        self.head = nn.Linear(4, 7)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(
            torch.tanh(self.tokens(ids) + self.places(torch.arange(ids.shape[1])[None]))
        )


def test_shared_positions_have_a_contribution_per_sample() -> None:
    """A regression with GPT-2: its table of positions saw a batch of one, and was refused."""
    torch.manual_seed(0)
    model = Placed().double()
    ids = torch.randint(7, (8, 6))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    bindings = bind_layers(model)
    recorder = Recorder(model, optimizer, bindings, everything(bindings))

    def each(rows: Tensor) -> Tensor:
        logits = model(rows)[:, :-1].transpose(1, 2)
        return functional.cross_entropy(logits, rows[:, 1:], reduction="none").mean(1)

    expected = []
    for row in ids:
        actual = torch.autograd.grad(each(row[None])[0] / 8, list(model.parameters()))
        named = dict(zip(dict(model.named_parameters()), actual, strict=True))
        expected.append(everything(bindings).project_tensors(named))
    with recorder.batch(IDS):
        each(ids).mean().backward()
    optimizer.step()
    torch.testing.assert_close(recorder.take_segment().contributions, torch.stack(expected))


def record_scaled(fused: bool, unscale: bool) -> Segment:
    """Train with a gradient scaler. The third of six losses overflows."""
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), 0.1, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    recorder = Recorder(model, optimizer)
    x = torch.randn(6, 4, 3)
    for step in range(6):
        optimizer.zero_grad()
        with recorder.batch(range(4)) as batch:
            own = model(x[step]).square().sum(1) * (torch.inf if step == 2 else 1)
            batch.losses = own
            scaler.scale(own.mean()).backward()
        if unscale:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
    return recorder.take_segment()


@pytest.mark.parametrize("unscale", [False, True])
def test_a_fused_step_under_a_scaler_is_recorded_as_any_other(unscale: bool) -> None:
    """A fused step divides by the scale itself, and is called in spite of an overflow."""
    expected = record_scaled(fused=False, unscale=unscale)
    actual = record_scaled(fused=True, unscale=unscale)
    assert actual.length == 5
    assert actual.scales.tolist() == [1 / 1024] * 2 + [1 / 512] * 3
    for name in ("contributions", "gradients", "states", "hyper"):
        torch.testing.assert_close(getattr(actual, name), getattr(expected, name))

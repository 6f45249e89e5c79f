"""Samples that are exchanged or mixed within a model are refused, though the sums agree."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from secateur.errors import SecateurError
from secateur.influence.bindings import bind_layers
from secateur.influence.hooks import sample_gradients
from secateur.influence.recorder import Recorder
from tests.influence.oracle import everything

B = 8
X = torch.randn(B, 10, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
TEXT = torch.randn(B, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
Y = torch.randint(3, (B,), generator=torch.Generator().manual_seed(2))
Losses = Callable[[nn.Module, Tensor], Tensor]


def cross_entropy(model: nn.Module, rows: Tensor) -> Tensor:
    return functional.cross_entropy(model(X[rows]), Y[rows], reduction="none")


def network(inner: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(10, 6), inner, nn.Tanh(), nn.Linear(6, 3)).double()


class Centered(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0, keepdim=True)


class MixedUp(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 0.7 * x + 0.3 * x.roll(1, 0)


class Sorted(nn.Module):
    """Puts the batch in another order, and back after a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        order = x[:, 0].argsort()
        return self.inner(x[order])[order.argsort()]


class TwoTowers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.image = nn.Linear(10, 6)
        self.text = nn.Linear(5, 6)


def contrast(model: nn.Module, rows: Tensor) -> Tensor:
    assert isinstance(model, TwoTowers)
    image = functional.normalize(model.image(X[rows]), dim=1)
    text = functional.normalize(model.text(TEXT[rows]), dim=1)
    return functional.cross_entropy(10 * image @ text.T, torch.arange(len(rows)), reduction="none")


def frozen(norm: nn.Module) -> nn.Module:
    return norm.requires_grad_(False)


MIXING: dict[str, tuple[Callable[[], nn.Module], Losses]] = {
    "batch norm without weights": (
        lambda: network(nn.BatchNorm1d(6, affine=False)),
        cross_entropy,
    ),
    "frozen batch norm": (lambda: network(frozen(nn.BatchNorm1d(6))), cross_entropy),
    "batch norm": (lambda: network(nn.BatchNorm1d(6)), cross_entropy),
    "batch norm and dropout": (
        lambda: network(nn.Sequential(nn.BatchNorm1d(6, affine=False), nn.Dropout(0.5))),
        cross_entropy,
    ),
    "centered over the batch": (lambda: network(Centered()), cross_entropy),
    "mixup": (lambda: network(MixedUp()), cross_entropy),
    "sorted": (lambda: network(Sorted()), cross_entropy),
    "contrastive": (lambda: TwoTowers().double(), contrast),
}


def record(model: nn.Module, losses: Losses, weights: Tensor | None = None) -> Tensor:
    bindings = bind_layers(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    recorder = Recorder(model, optimizer, bindings, everything(bindings))
    rows = torch.arange(B)

    def losses_of(places: Tensor) -> Tensor:
        return losses(model, places)

    with recorder.batch(rows, weights, losses_of=losses_of):
        losses(model, rows).mean().backward()
    optimizer.step()
    return recorder.take_segment().contributions


@pytest.mark.parametrize("name", MIXING)
def test_mixed_samples_are_refused(name: str) -> None:
    make, losses = MIXING[name]
    with pytest.raises(SecateurError, match=r"mixes|cannot be run alone|depend on one another"):
        record(make().train(), losses)


def test_the_refusal_leaves_running_statistics() -> None:
    model = network(nn.Sequential(nn.BatchNorm1d(6, affine=False), nn.Dropout(0.5))).train()
    before = {name: b.clone() for name, b in model.named_buffers()}
    bindings = bind_layers(model)
    with pytest.raises(SecateurError):
        sample_gradients(
            lambda rows: cross_entropy(model, rows), B, bindings, everything(bindings), check=True
        )
    after = dict(model.named_buffers())
    # One pass of the model is the caller's own.
    assert int(after["1.0.num_batches_tracked"]) - int(before["1.0.num_batches_tracked"]) == 1


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_samples_that_are_not_mixed_pass(dropout: float) -> None:
    model = network(nn.Dropout(dropout)).train()
    assert record(model, cross_entropy).shape[0] == B


def test_wrong_weights_are_refused() -> None:
    with pytest.raises(SecateurError, match=r"weights .* 0\.125 times as large"):
        record(network(nn.Tanh()), cross_entropy, torch.ones(B))


def test_losses_that_are_always_random_are_not_checked_and_that_is_said() -> None:
    def noisy(model: nn.Module, rows: Tensor) -> Tensor:
        return cross_entropy(model, rows) * (1 + torch.rand(len(rows)).double())

    model = network(nn.Tanh())
    bindings = bind_layers(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        sample_gradients(
            lambda rows: noisy(model, rows), B, bindings, everything(bindings), check=True
        )
    assert "random in eval mode too" in str(caught[-1].message)


class MergedAdapter(nn.Module):
    """A low-rank adapter that is merged into the weight in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(10, 3)
        self.down = nn.Linear(10, 2, bias=False)
        self.up = nn.Linear(2, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            return self.base(x) + self.up(self.down(x))
        merged = (self.up.weight @ self.down.weight).detach()
        return functional.linear(x, self.base.weight + merged, self.base.bias)


def test_an_adapter_that_is_merged_in_eval_mode_is_refused() -> None:
    """A regression: the targets' gradients of its parameters were zero."""
    model = MergedAdapter().double().eval()
    bindings = bind_layers(model)
    with pytest.raises(SecateurError, match=r"takes part in training and not in eval mode"):
        sample_gradients(
            lambda rows: cross_entropy(model, rows), B, bindings, everything(bindings), check=True
        )


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradients_under_checkpointing(reentrant: bool, first: int) -> None:
    """A regression: with reentrant checkpointing, targets' gradients were zero, and refused if a
    trained layer (`first` of them) came before the checkpointed ones."""
    from torch.utils.checkpoint import checkpoint

    model = network(nn.Tanh())
    assert isinstance(model, nn.Sequential)

    def losses(rows: Tensor) -> Tensor:
        inputs = model[:first](X[rows].requires_grad_())
        hidden = checkpoint(model[first:3], inputs, use_reentrant=reentrant)
        return functional.cross_entropy(model[3](hidden), Y[rows], reduction="none")

    bindings = bind_layers(model)
    basis = everything(bindings)
    actual, _ = sample_gradients(losses, B, bindings, basis, check=True)
    expected, _ = sample_gradients(
        lambda rows: cross_entropy(model, rows), B, bind_layers(model), basis
    )
    torch.testing.assert_close(actual, expected)
    assert all(p.grad is None for p in model.parameters())


class Exchanged(nn.Module):
    """Exchanges the first and the last sample for a layer, and back."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        order = torch.arange(len(x))
        order[[0, -1]] = order[[-1, 0]]
        return self.inner(x[order])[order]


def test_small_samples_that_are_exchanged_beside_a_large_one_are_refused() -> None:
    """A regression: distances were measured against the largest sample run alone."""

    def losses(model: nn.Module, rows: Tensor) -> Tensor:
        scale = torch.where(rows == B // 2, 1e4, 1.0).double()
        return cross_entropy(model, rows) * scale

    with pytest.raises(SecateurError, match="mixes a batch's samples"):
        record(network(Exchanged()), losses)

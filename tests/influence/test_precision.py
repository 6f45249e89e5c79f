"""Contributions in bfloat16 against autograd in float32, one sample at a time, in every basis."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from secateur.errors import SecateurError
from secateur.influence.basis import Basis
from secateur.influence.basis_fitting import EnergyFit, MomentFit
from secateur.influence.bindings import Bindings, bind_layers
from secateur.influence.hooks import capture_hooks, sample_gradients
from secateur.influence.random_basis import random_coordinates, random_kronecker_basis
from secateur.influence.recorder import Recorder
from tests.influence.oracle import everything, one_by_one, relative

IDS = torch.randint(11, (6, 7), generator=torch.Generator().manual_seed(0))
ROWS = torch.arange(6)
BASES = ("random kronecker", "pca", "random coordinates", "energy", "all coordinates")
HALF = pytest.mark.parametrize("autocast", [True, False], ids=["autocast", "weights"])


class Sequence(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 8)
        self.norm = nn.LayerNorm(8)
        self.inner = nn.Linear(8, 8)
        self.head = nn.Linear(8, 11)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.inner(self.norm(self.table(ids)))).cumsum(1))


def make(autocast: bool) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    torch.manual_seed(0)
    model = Sequence() if autocast else Sequence().bfloat16()

    def losses(rows: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return next_losses(model, rows)

    return model, losses


def next_losses(model: nn.Module, rows: Tensor) -> Tensor:
    logits = model(IDS[rows])[:, :-1].transpose(1, 2).float()
    return functional.cross_entropy(logits, IDS[rows, 1:], reduction="none").mean(1)


IMAGES = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(2))
LABELS = torch.randint(3, (6,), generator=torch.Generator().manual_seed(3))
# Without kinks, on whose other side rounding may put an activation.
IMAGE_MODELS: dict[str, Callable[[], nn.Sequential]] = {
    "linear": lambda: nn.Sequential(nn.Flatten(), nn.Linear(192, 6), nn.Tanh(), nn.Linear(6, 3)),
    "convolution": lambda: nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.Tanh(), nn.Flatten(), nn.Linear(144, 3)
    ),
    "depthwise": lambda: nn.Sequential(
        nn.Conv2d(3, 6, 3, groups=3), nn.Tanh(), nn.Flatten(), nn.Linear(216, 3)
    ),
}


@HALF
@pytest.mark.parametrize("name", IMAGE_MODELS)
def test_convolutions_in_every_basis(name: str, autocast: bool) -> None:
    """A regression: coordinates of a convolution, fits and targets crashed under autocast."""
    torch.manual_seed(0)
    model = IMAGE_MODELS[name]()
    model = model if autocast else model.bfloat16()
    single = copy.deepcopy(model).float()
    rounded = IMAGES if autocast else IMAGES.bfloat16()

    def losses(places: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            logits = model(rounded[places])
        return functional.cross_entropy(logits.float(), LABELS[places], reduction="none")

    def single_losses(model: nn.Module, places: Tensor) -> Tensor:
        logits = model(rounded[places].float())
        return functional.cross_entropy(logits, LABELS[places], reduction="none")

    expected = one_by_one(single, single_losses, ROWS)
    bindings = bind_layers(model)
    whole = everything(bindings)
    found, _ = sample_gradients(losses, 6, bindings, whole, check=True)
    assert max(map(relative, found, expected)) < 2e-2
    for kind in BASES:
        basis = fitted(kind, bindings, losses)
        found, _ = sample_gradients(losses, 6, bindings, basis)
        projected = torch.stack([basis.project_tensors(whole.lift_to_tensors(g)) for g in expected])
        assert max(map(relative, found, projected)) < 3e-2, kind


def fitted(kind: str, bindings: Bindings, losses: Callable[[Tensor], Tensor]) -> Basis:
    if kind == "random kronecker":
        return random_kronecker_basis(bindings, 4, 0, torch.float32)
    if kind == "random coordinates":
        return random_coordinates(bindings, 64, 0)
    if kind == "all coordinates":
        return everything(bindings)
    fit = MomentFit(bindings, 4) if kind == "pca" else EnergyFit(bindings)
    with capture_hooks(bindings, fit.add, len(ROWS)):
        losses(ROWS).mean().backward()
    bindings.model.zero_grad()
    return fit.basis(torch.float32) if isinstance(fit, MomentFit) else fit.basis(64)


@HALF
def test_contributions_are_those_of_single_precision(autocast: bool) -> None:
    model, losses = make(autocast)
    bindings = bind_layers(model)
    found, _ = sample_gradients(losses, 6, bindings, everything(bindings), check=True)
    single = copy.deepcopy(model).float()
    expected = one_by_one(single, next_losses, ROWS)
    for own, wanted in zip(found, expected, strict=True):
        assert relative(own, wanted) < 2e-2


@HALF
@pytest.mark.parametrize("kind", BASES)
def test_every_basis_records_without_a_tolerance(kind: str, autocast: bool) -> None:
    model, losses = make(autocast)
    bindings = bind_layers(model)
    basis = fitted(kind, bindings, losses)
    linear = kind in ("random kronecker", "pca")
    optimizer: torch.optim.Optimizer = (
        torch.optim.SGD(model.parameters(), 0.1)
        if linear
        else torch.optim.AdamW(model.parameters(), 0.01)
    )
    recorder = Recorder(model, optimizer, bindings, basis)
    for _ in range(5):
        optimizer.zero_grad()
        with recorder.batch(ROWS, losses_of=losses) as batch:
            batch.losses = own = losses(ROWS)
            own.mean().backward()
        optimizer.step()
    assert recorder.take_segment().contributions.isfinite().all()


def test_a_grad_scaler_in_half_precision() -> None:
    """Contributions are those of the unscaled loss."""
    torch.manual_seed(0)
    model = Sequence()
    bindings = bind_layers(model)
    basis = everything(bindings)
    expected = one_by_one(model, next_losses, ROWS)
    model.zero_grad()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    recorder = Recorder(model, optimizer, bindings, basis)
    with recorder.batch(ROWS) as batch:
        with torch.autocast("cpu", torch.float16):
            batch.losses = losses = next_losses(model, ROWS)
        scaler.scale(losses.mean()).backward()
    scaler.step(optimizer)
    scaler.update()
    assert relative(recorder.take_segment().contributions, expected / 6) < 2e-2


@pytest.mark.parametrize("size", [1.0, 1e-7], ids=["plain", "small"])
def test_samples_that_run_alone_are_scaled_too(size: float) -> None:
    """A regression: overflows were refused, and so were gradients that vanish without a factor."""
    torch.manual_seed(0)
    model = Sequence()
    bindings = bind_layers(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**22 / size)

    def losses_of(places: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.float16):
            return next_losses(model, places) * size

    recorder = Recorder(model, optimizer, bindings, everything(bindings))
    expected = one_by_one(model, next_losses, ROWS) * size
    for _ in range(9):
        optimizer.zero_grad()
        with recorder.batch(ROWS, losses_of=losses_of) as batch:
            batch.losses = losses = losses_of(ROWS)
            scaler.scale(losses.mean()).backward()
        scaler.step(optimizer)
        scaler.update()
        if recorder.next_step == 1:
            break
    assert scaler.get_scale() < 2.0**22 / size
    assert relative(recorder.take_segment().contributions, expected / 6) < 2e-2


def record_frequent(rows: int, length: int, factor: float) -> Tensor:
    """Record one step in bfloat16 of texts that are mostly one token, and return the weights.

    Args:
        factor: what the gradient is multiplied by before the optimizer's step.
    """
    torch.manual_seed(0)
    model = Sequence().bfloat16()
    ids = torch.randint(11, (rows, length))
    ids[torch.rand(rows, length) < 0.8] = 3

    def losses(places: Tensor) -> Tensor:
        logits = model.head(model.table(ids[places])).transpose(1, 2).float()
        return functional.cross_entropy(logits, ids[places], reduction="none").mean(1)

    for parameter in (*model.norm.parameters(), *model.inner.parameters()):
        parameter.requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    bindings = bind_layers(model)
    recorder = Recorder(model, optimizer, bindings, everything(bindings))
    places = torch.arange(rows)
    with recorder.batch(places, losses_of=losses) as batch:
        batch.losses = own = losses(places)
        own.mean().backward()
    for parameter in bindings.parameters().values():
        assert parameter.grad is not None
        parameter.grad *= factor
    optimizer.step()
    return recorder.take_segment().weights


@pytest.mark.parametrize("factor", [1.0, 0.5])
def test_coarse_sums_of_an_embedding_are_no_factor(factor: float) -> None:
    """A regression: the rounding of frequent tokens was refused, or recorded as clipping by 2%."""
    weights = record_frequent(64, 12, factor)
    exact = torch.full_like(weights, factor / 64)
    torch.testing.assert_close(weights, exact, rtol=0 if factor == 1 else 5e-3, atol=0)


def test_an_embedding_that_loses_its_gradient_is_refused_by_its_own_sentence() -> None:
    with pytest.raises(SecateurError, match=r"gradient of table\.weight .* in half precision"):
        record_frequent(256, 60, 1.0)

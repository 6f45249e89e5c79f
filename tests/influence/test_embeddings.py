"""Scores of embeddings, against retraining without a sample and the explicit route."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence

import pytest
import torch
from scipy.stats import spearmanr
from torch import Tensor, nn
from torch.nn import functional

from secateur.errors import SecateurError
from secateur.influence.bindings import bind_layers
from secateur.influence.coordinate_basis import CoordinateBasis
from secateur.influence.curvature import EmpiricalFisher, NoCurvature
from secateur.influence.embeddings import Embeddings, embed
from secateur.influence.hooks import sample_gradients
from secateur.influence.kronecker_basis import KroneckerBasis
from secateur.influence.random_basis import random_coordinates, random_kronecker_basis
from secateur.influence.recorder import Recorder
from secateur.influence.recursion import Dynamics, identity_transition, walk_segment

Make = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
MOMENTUM: Make = lambda p: torch.optim.SGD(p, 0.05, momentum=0.9)  # noqa: E731
OPTIMIZERS: dict[str, Make] = {
    "sgd": lambda p: torch.optim.SGD(p, 0.05),
    "momentum": MOMENTUM,
    # A large epsilon, because AdamW's first steps are signs, whose effects are not linear.
    "adamw": lambda p: torch.optim.AdamW(p, 0.01, eps=0.1, weight_decay=0.01),
}
BATCH = 8
BATCHES = torch.arange(48).split(BATCH)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(60, 6, generator=generator, dtype=torch.float64)
    return x, x[:, :3].argmax(1)


QUESTION = torch.arange(12)


def question(model: nn.Module, rows: Tensor = QUESTION) -> Tensor:
    """The losses of twelve samples that are not trained on, or of some of these."""
    x, y = data()
    return functional.cross_entropy(model(x[48:][rows]), y[48:][rows], reduction="none")


def record(
    make: Make, batches: Sequence[Tensor | Sequence[int]] = BATCHES, **options: object
) -> tuple[nn.Module, Recorder]:
    """Train one pass over the data, recorded as in the quickstart."""
    model = network()
    x, y = data()
    optimizer = make(model.parameters())
    recorder = Recorder(model, optimizer, **options)  # type: ignore[arg-type]
    for ids in batches:
        rows = torch.as_tensor(ids)
        optimizer.zero_grad()
        with recorder.batch(ids) as batch:
            losses = functional.cross_entropy(model(x[rows]), y[rows], reduction="none")
            batch.losses = losses
            losses.mean().backward()
        optimizer.step()
    return model, recorder


def loss_without(make: Make, removed: int) -> float:
    """The question's mean loss after training without one sample."""
    model = network()
    x, y = data()
    optimizer = make(model.parameters())
    for rows in BATCHES:
        weights = (rows != removed).double() / BATCH
        optimizer.zero_grad()
        losses = functional.cross_entropy(model(x[rows]), y[rows], reduction="none")
        (losses @ weights).backward()
        optimizer.step()
    return float(question(model).mean().detach())


@pytest.mark.parametrize("coupled", [False, True])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_scores_agree_with_retraining(name: str, coupled: bool) -> None:
    make = OPTIMIZERS[name]
    bindings = bind_layers(network())
    basis = random_coordinates(bindings, None, seed=0)  # all coordinates
    model, recorder = record(make, basis=basis)
    base = float(question(model).mean().detach())
    effects = [loss_without(make, sample) - base for sample in range(48)]
    embeddings = embed(recorder, coupled=coupled)
    scores = embeddings.scores(lambda: question(model))
    assert embeddings.samples.tolist() == list(range(48))
    assert spearmanr(effects, scores.tolist()).statistic > 0.9
    # Not only the order, but also the size and the sign.
    slope = float(scores @ torch.tensor(effects, dtype=torch.float64) / (scores @ scores))
    assert 0.7 < slope < 1.3


@pytest.mark.parametrize("curvature", [EmpiricalFisher, NoCurvature])
@pytest.mark.parametrize("coupled", [False, True])
@pytest.mark.parametrize("name", ["momentum", "adamw"])
def test_scores_are_those_of_the_explicit_route(
    name: str, coupled: bool, curvature: type[EmpiricalFisher] | type[NoCurvature]
) -> None:
    model, recorder = record(OPTIMIZERS[name], coefficients=30)
    embeddings = embed(recorder, curvature, coupled)
    scores = embeddings.scores(lambda: question(model))

    _, again = record(OPTIMIZERS[name], coefficients=30)
    segment = again.take_segment()
    basis = again.basis
    spans = [slice(0, basis.size)] if coupled else list(basis.spans)
    dynamics = Dynamics.from_segment(segment, again.update_rule, curvature(segment, spans), spans)
    slots = len(again.update_rule.slots) + 1
    effects, _ = walk_segment(dynamics, identity_transition(spans, slots, torch.float64))
    gradients, _ = sample_gradients(
        lambda rows: question(model, rows), 12, bind_layers(model), basis
    )
    expected = torch.zeros(48, dtype=torch.float64)
    for vectors, span in zip(effects, spans, strict=True):
        expected += vectors[:, : span.stop - span.start] @ gradients[:, span].mean(0)
    torch.testing.assert_close(embeddings.vectors, torch.cat(effects, 1), rtol=0, atol=0)
    torch.testing.assert_close(scores, expected)
    assert embeddings.vectors.shape == (48, slots * basis.size)


def test_ids_are_a_tensor_a_list_or_a_range() -> None:
    results = []
    for convert in (
        lambda ids: ids,
        lambda ids: ids.tolist(),
        lambda ids: range(int(ids[0]), int(ids[-1]) + 1),
    ):
        _, recorder = record(MOMENTUM, [convert(ids) for ids in BATCHES])
        results.append(recorder.take_segment())
    for other in results[1:]:
        assert torch.equal(other.samples, results[0].samples)
        assert torch.equal(other.contributions, results[0].contributions)


def test_the_default_basis_fits_the_optimizer_and_follows_the_seed() -> None:
    bindings = bind_layers(network())
    _, momentum = record(MOMENTUM, seed=3)
    assert isinstance(momentum.basis, KroneckerBasis)
    expected = random_kronecker_basis(bindings, 16, 3, torch.float64).tensors()
    for name, factor in momentum.basis.tensors().items():
        assert torch.equal(factor, expected[name])
    _, adamw = record(OPTIMIZERS["adamw"], coefficients=20, seed=3)
    assert isinstance(adamw.basis, CoordinateBasis)
    entries = random_coordinates(bindings, 20, 3).tensors()
    for name, chosen in adamw.basis.tensors().items():
        assert torch.equal(chosen, entries[name])
    assert adamw.basis.size == 20
    other = random_coordinates(bindings, 20, 4).tensors()
    assert not torch.equal(other["0.entries"], entries["0.entries"])


def test_random_coordinates_are_distinct_entries() -> None:
    bindings = bind_layers(network())
    for block, entries in zip(
        bindings.blocks, random_coordinates(bindings, 25, 0).entries, strict=True
    ):
        assert entries.tolist() == sorted(set(entries.tolist()))
        assert 0 <= int(entries[0]) <= int(entries[-1]) < block.size


def test_uncaptured_parameters_are_listed() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Bilinear(4, 4, 2))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    assert sorted(Recorder(model, optimizer, uncaptured=["1.*"]).parameters) == [
        "0.bias",
        "0.weight",
    ]


def test_nothing_recorded_is_an_error() -> None:
    model = network()
    recorder = Recorder(model, MOMENTUM(model.parameters()))
    with pytest.raises(SecateurError, match="nothing was recorded"):
        embed(recorder)
    _, recorder = record(MOMENTUM)
    assert isinstance(embed(recorder), Embeddings)
    with pytest.raises(SecateurError, match="nothing was recorded"):
        embed(recorder)


def test_records_outside_the_windows_are_not_embedded() -> None:
    model = network()
    x, y = data()
    optimizer = MOMENTUM(model.parameters())
    recorder = Recorder(model, optimizer)
    for step, rows in enumerate(BATCHES):
        optimizer.zero_grad()
        with recorder.batch(rows, window=-1 if step < 4 else 0):
            functional.cross_entropy(model(x[rows]), y[rows]).backward()
        optimizer.step()
    embeddings = embed(recorder)
    assert embeddings.samples.tolist() == list(range(32, 48))
    assert embeddings.steps.unique().tolist() == [4, 5]
    assert embeddings.scores(lambda: question(model)).shape == (16,)


def test_a_question_changes_no_gradient() -> None:
    model, recorder = record(MOMENTUM)
    before = [copy.deepcopy(parameter.grad) for parameter in model.parameters()]
    embed(recorder).scores(lambda: question(model))
    for parameter, gradient in zip(model.parameters(), before, strict=True):
        assert parameter.grad is not None
        assert gradient is not None
        assert torch.equal(parameter.grad, gradient)

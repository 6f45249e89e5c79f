"""The Gauss-Newton matrix, against explicit Jacobians of the model and Hessians of the loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from secateur.errors import SecateurError
from secateur.influence.bindings import bind_layers
from secateur.influence.gauss_newton import compute_gauss_newton
from secateur.influence.hessian import compute_hessian
from tests.influence.oracle import everything

Losses = Callable[[Tensor, Tensor], Tensor]


def cross_entropy(outputs: Tensor, labels: Tensor) -> Tensor:
    return functional.cross_entropy(outputs, labels)


def squared(outputs: Tensor, labels: Tensor) -> Tensor:
    """It is negatively curved in places, and couples the outputs of one sample."""
    targets = functional.one_hot(labels, outputs.shape[1]).to(outputs)
    return ((outputs - targets).pow(2).sum(1) + outputs.prod(1)).mean()


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.GroupNorm(1, 3), nn.Linear(3, 3)).double()


def data() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(6, 4, dtype=torch.float64), torch.randint(3, (6,))


def expected_matrix(model: nn.Module, x: Tensor, y: Tensor, loss: Losses) -> Tensor:
    """`J^T H J` in all parameters, with `J` and `H` in full."""
    basis = everything(bind_layers(model))
    named = {name: p.detach() for name, p in model.named_parameters()}

    def outputs_of(coefficients: Tensor) -> Tensor:
        return torch.func.functional_call(model, basis.lift_to_tensors(coefficients), (x,))

    jacobian = torch.autograd.functional.jacobian(outputs_of, basis.project_tensors(named))
    outputs = outputs_of(basis.project_tensors(named)).detach()
    hessian = torch.autograd.functional.hessian(lambda z: loss(z, y), outputs)
    return torch.einsum("iap,iajb,jbq->pq", jacobian, hessian, jacobian)


@pytest.mark.parametrize("loss", [cross_entropy, squared])
def test_it_is_the_product_of_jacobians_and_the_losss_hessian(loss: Losses) -> None:
    model = network()
    x, y = data()
    basis = everything(bind_layers(model))
    expected = expected_matrix(model, x, y, loss)
    halves = [lambda: loss(model(x), y) * 0.25, lambda: loss(model(x), y) * 0.75]
    found = compute_gauss_newton(halves, model, basis, [slice(0, basis.size)])
    torch.testing.assert_close(found.view(expected.shape), expected, rtol=1e-10, atol=1e-12)
    blocks = compute_gauss_newton(halves[:1], model, basis, basis.spans)
    parts = [0.25 * expected[span, span].flatten() for span in basis.spans]
    torch.testing.assert_close(blocks, torch.cat(parts), rtol=1e-10, atol=1e-12)
    assert all(p.grad is None for p in model.parameters())


def test_of_a_cross_entropy_it_is_the_fisher_information_over_all_labels() -> None:
    model = network()
    x, y = data()
    basis = everything(bind_layers(model))
    expected = torch.zeros(basis.size, basis.size, dtype=torch.float64)
    for sample in x:
        shares = model(sample[None])[0].log_softmax(0)
        for log_share in shares:
            names = [name for name, _ in model.named_parameters()]
            values = torch.autograd.grad(log_share, list(model.parameters()), retain_graph=True)
            row = basis.project_tensors(dict(zip(names, values, strict=True)))
            expected += log_share.detach().exp() * torch.outer(row, row) / len(x)
    found = compute_gauss_newton(
        [lambda: cross_entropy(model(x), y)], model, basis, [slice(0, basis.size)]
    )
    torch.testing.assert_close(found.view(expected.shape), expected, rtol=1e-10, atol=1e-12)


def test_of_a_linear_model_it_is_the_hessian() -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 3).double()
    x, y = data()
    basis = everything(bind_layers(model))
    losses = [lambda: squared(model(x), y)]
    whole = [slice(0, basis.size)]
    torch.testing.assert_close(
        compute_gauss_newton(losses, model, basis, whole),
        compute_hessian(losses, model, basis, whole),
    )


class Calls(nn.Module):
    """Returns more than one tensor: what a loss reads, and what it does not."""

    def __init__(self, mean_loss: bool = False) -> None:
        super().__init__()
        self.body = network()
        self.mean_loss = mean_loss

    def forward(self, x: Tensor) -> dict[str, Tensor | tuple[Tensor, ...]]:
        hidden = self.body[:3](x)
        logits = self.body[3](hidden)
        given = {"hidden": (x, hidden), "logits": logits, "mean": logits.mean()}
        return {key: value for key, value in given.items() if key != "mean" or self.mean_loss}


def test_a_loss_may_read_some_of_what_several_calls_return_and_change_it_in_place() -> None:
    model = Calls(mean_loss=True)
    x, y = data()
    basis = everything(bind_layers(model))

    def loss() -> Tensor:
        first, second = model(x[:2]), model(x[2:])
        logits = torch.cat([first["logits"].mul_(1.0), second["logits"]])
        return cross_entropy(logits, y) + first["mean"]  # linear: it adds nothing

    expected = expected_matrix(model.body, x, y, cross_entropy)
    found = compute_gauss_newton([loss], model, basis, [slice(0, basis.size)])
    torch.testing.assert_close(found.view(expected.shape), expected, rtol=1e-10, atol=1e-12)


@dataclass
class Unknown:
    """What a model may return, in which no tensor can be found."""

    logits: Tensor


class Wrapped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = network()

    def forward(self, x: Tensor) -> Unknown:
        return Unknown(self.body(x))


def test_what_is_not_a_function_of_the_models_outputs_is_refused() -> None:
    x, y = data()
    model = network()
    weight = model.get_parameter("0.weight")
    wrapped = Wrapped()
    computed = Calls(mean_loss=True)

    def penalty() -> Tensor:
        return cross_entropy(model(x), y) + weight.pow(2).sum()

    def chained() -> Tensor:
        return cross_entropy(model(nn.functional.pad(model(x), (0, 1))), y)

    cases: list[tuple[nn.Module, Callable[[], Tensor], str]] = [
        (model, penalty, "depends on parameter 0.weight in another way than through"),
        (model, lambda: cross_entropy(model[3](model[:3](x)), y), "without a call of the model"),
        (wrapped, lambda: cross_entropy(wrapped(x).logits, y), "parameter body.0.weight in anot"),
        (computed, lambda: computed(x)["mean"], "linear in what the model returns"),
        (model, chained, "one call of the model reads what another returned"),
    ]
    for case, loss, sentence in cases:
        basis = everything(bind_layers(case))
        with pytest.raises(SecateurError, match=sentence):
            compute_gauss_newton([loss], case, basis, basis.spans)
        assert not case._forward_hooks

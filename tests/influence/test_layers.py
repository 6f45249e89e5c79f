"""Contributions of every layer family against autograd one sample at a time."""

from __future__ import annotations

import textwrap
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.pytorch_utils import Conv1D

from secateur.errors import SecateurError
from secateur.influence.bindings import bind_layers
from secateur.influence.layers import LayerFamily, register_layer, registry
from secateur.influence.layers.linear import LinearFamily
from secateur.influence.layers.norm import HuggingFaceRMSNormFamily
from tests.influence.oracle import captured, one_by_one, relative

LIMIT = {torch.float32: 1e-5, torch.float64: 1e-12}


def squares(model: nn.Module, inputs: Tensor) -> Tensor:
    """Return one loss per sample, in which every output counts differently."""
    out = model(inputs).flatten(1)
    return (out * torch.linspace(0.5, 1.5, out.shape[1], dtype=out.dtype)).sin().sum(1)


def images(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


FLOATING = {
    "linear": (lambda: nn.Linear(5, 3), (4, 5)),
    "linear without bias": (lambda: nn.Linear(5, 3, bias=False), (4, 5)),
    "linear, positions": (lambda: nn.Linear(5, 3), (4, 6, 5)),
    "linear, two dimensions of positions": (lambda: nn.Linear(5, 3), (4, 2, 3, 5)),
    "Hugging Face Conv1D": (lambda: Conv1D(3, 5), (4, 6, 5)),
    "conv1d": (lambda: nn.Conv1d(2, 3, 3, stride=2, padding=1), (4, 2, 9)),
    "conv1d groups": (lambda: nn.Conv1d(4, 6, 3, groups=2, dilation=2), (4, 4, 9)),
    "conv2d": (lambda: nn.Conv2d(2, 3, 3), (4, 2, 6, 5)),
    "conv2d same": (lambda: nn.Conv2d(2, 3, (5, 3), padding="same"), (4, 2, 6, 5)),
    "conv2d valid": (lambda: nn.Conv2d(2, 3, (2, 3), padding="valid", bias=False), (4, 2, 6, 5)),
    "conv2d circular": (
        lambda: nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"),
        (4, 2, 6, 5),
    ),
    "conv2d reflect": (
        lambda: nn.Conv2d(2, 3, 3, padding=(1, 2), padding_mode="reflect", stride=(2, 1)),
        (4, 2, 6, 5),
    ),
    "conv2d dilation": (
        lambda: nn.Conv2d(2, 4, 3, dilation=(1, 2), padding=2, groups=2),
        (4, 2, 6, 5),
    ),
    "conv2d depthwise": (lambda: nn.Conv2d(3, 3, 3, groups=3, bias=False), (4, 3, 6, 5)),
    "layer norm": (lambda: nn.LayerNorm(5), (4, 6, 5)),
    "layer norm, two dimensions": (lambda: nn.LayerNorm((3, 5)), (4, 3, 5)),
    "layer norm without bias": (lambda: nn.LayerNorm(5, bias=False), (4, 5)),
    "rms norm": (lambda: nn.RMSNorm(5), (4, 6, 5)),
    "Hugging Face rms norm": (lambda: LlamaRMSNorm(5), (4, 6, 5)),
    "batch norm 1d": (lambda: nn.BatchNorm1d(5).eval(), (4, 5)),
    "batch norm 1d, positions": (lambda: nn.BatchNorm1d(5).eval(), (4, 5, 3)),
    "batch norm 2d": (lambda: nn.BatchNorm2d(3).eval(), (4, 3, 6, 5)),
    "group norm": (lambda: nn.GroupNorm(2, 4), (4, 4, 6, 5)),
}


@pytest.mark.parametrize("dtype", LIMIT)
@pytest.mark.parametrize("name", FLOATING)
def test_contributions_are_autograds(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    make, shape = FLOATING[name]
    layer = make().to(dtype)
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    inputs = torch.randn(*shape, dtype=dtype)
    assert (
        relative(captured(layer, squares, inputs), one_by_one(layer, squares, inputs))
        < LIMIT[dtype]
    )


@pytest.mark.parametrize("padding", [None, 0, 3])
def test_embedding(padding: int | None) -> None:
    layer = nn.Embedding(7, 4, padding_idx=padding).double()
    inputs = torch.randint(7, (5, 6))
    assert relative(captured(layer, squares, inputs), one_by_one(layer, squares, inputs)) < 1e-12


class Tied(nn.Module):
    """An embedding whose table is also the weight of a head with a bias, and a layer run twice."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 4)
        self.twice = nn.Linear(4, 4)
        self.head = nn.Linear(4, 7)
        self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.twice(self.twice(self.table(ids)).tanh()))


def test_tied_weights_and_a_layer_called_twice() -> None:
    torch.manual_seed(0)
    model = Tied().double()
    inputs = torch.randint(7, (5, 6))
    assert len(bind_layers(model).blocks) == 2
    assert relative(captured(model, squares, inputs), one_by_one(model, squares, inputs)) < 1e-12


@pytest.mark.parametrize("frozen", ["weight", "bias"])
def test_frozen_parameters_have_no_column(frozen: str) -> None:
    model = nn.Linear(5, 3).double()
    getattr(model, frozen).requires_grad_(False)
    inputs = images(4, 5)
    actual = captured(model, squares, inputs)
    assert actual.shape[1] == (3 if frozen == "weight" else 15)
    assert relative(actual, one_by_one(model, squares, inputs)) < 1e-12


def test_uncaptured_parameters_are_named_and_counted() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Bilinear(4, 4, 2))
    actual = bind_layers(model, ["1.*"])
    assert actual.uncaptured == {"1.weight": 32, "1.bias": 2}
    assert [block.name for block in actual.blocks] == ["0.weight"]


def test_a_pattern_that_matches_nothing_is_an_error() -> None:
    with pytest.raises(SecateurError, match=r"pattern decoder\.\* .* matches no parameter"):
        bind_layers(nn.Linear(3, 4), ["decoder.*"])


def test_batch_norm_in_train_mode_is_refused() -> None:
    with pytest.raises(SecateurError, match="mixes the samples"):
        captured(nn.BatchNorm1d(5), squares, torch.randn(4, 5))


def test_embedding_settings_that_mix_samples_are_refused() -> None:
    with pytest.raises(SecateurError, match="scale_grad_by_freq"):
        bind_layers(nn.Embedding(5, 3, scale_grad_by_freq=True))


class CopiedNorm(nn.Module):
    """A copy of LlamaRMSNorm, as most models of transformers have."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5))
        self.variance_epsilon = 0.1

    def forward(self, hidden_states: Tensor) -> Tensor:
        input_dtype = hidden_states.dtype
        hidden_states = hidden_states.to(torch.float32)
        variance = hidden_states.pow(2).mean(-1, keepdim=True)
        hidden_states = hidden_states * torch.rsqrt(variance + self.variance_epsilon)
        return self.weight * hidden_states.to(input_dtype)


class AlteredNorm(CopiedNorm):
    """The same with another constant."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        input_dtype = hidden_states.dtype
        hidden_states = hidden_states.to(torch.float32)
        variance = hidden_states.pow(3).mean(-1, keepdim=True)
        hidden_states = hidden_states * torch.rsqrt(variance + self.variance_epsilon)
        return self.weight * hidden_states.to(input_dtype)


def test_a_copy_of_a_forward_has_its_family() -> None:
    assert isinstance(registry.find_layer_family(CopiedNorm()), HuggingFaceRMSNormFamily)
    assert registry.find_layer_family(AlteredNorm()) is None
    model = nn.Sequential(CopiedNorm(), nn.Linear(5, 3))
    x = torch.randn(4, 6, 5)
    assert relative(captured(model, squares, x), one_by_one(model, squares, x)) < 1e-5


def test_a_user_registers_a_layer() -> None:
    class Cosine(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 5).double())
            self.bias = None

        def forward(self, x: Tensor) -> Tensor:
            return functional.linear(x, self.weight).cos()

    @register_layer(Cosine)
    class CosineFamily(LinearFamily):
        def capture(self, module: nn.Module, inputs: tuple, gradient: Tensor):
            assert isinstance(module.weight, Tensor)
            inner = functional.linear(inputs[0], module.weight)
            return super().capture(module, inputs, -gradient * inner.sin())

    model = Cosine()
    inputs = images(4, 5)
    assert issubclass(CosineFamily, LayerFamily)
    assert relative(captured(model, squares, inputs), one_by_one(model, squares, inputs)) < 1e-12


def test_the_registrys_example_works() -> None:
    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(5).double())

        def forward(self, x: Tensor) -> Tensor:
            return x * self.weight

    assert registry.__doc__ is not None
    example = registry.__doc__.partition("::\n")[2].partition("\nA layer without")[0]
    names: dict[str, Any] = {"Scale": Scale}
    exec(textwrap.dedent(example), names)
    model = Scale()
    inputs = images(4, 5)
    assert issubclass(names["ScaleFamily"], LayerFamily)
    assert relative(captured(model, squares, inputs), one_by_one(model, squares, inputs)) < 1e-12

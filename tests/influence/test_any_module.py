"""Contributions of modules of no known family, against autograd one sample at a time."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations

from secateur.errors import SecateurError
from secateur.influence.bindings import bind_layers
from tests.influence.oracle import captured, one_by_one, relative
from tests.influence.test_layers import squares


def vector() -> Tensor:
    return torch.randn(4, 10, dtype=torch.float64)


def sequence() -> Tensor:
    return torch.randn(4, 5, 10, dtype=torch.float64)


def image() -> Tensor:
    return torch.randn(4, 3, 9, 9, dtype=torch.float64)


def words() -> Tensor:
    return torch.randint(7, (4, 5))


def mlp(first: nn.Module) -> nn.Module:
    return nn.Sequential(first, nn.Tanh(), nn.Linear(6, 3))


class LowRankLinear(nn.Linear):
    """A frozen weight, and trainable low-rank factors as the layer's own parameters."""

    def __init__(self) -> None:
        super().__init__(10, 6)
        self.weight.requires_grad_(False)
        self.down = nn.Parameter(torch.randn(2, 10))
        self.up = nn.Parameter(torch.randn(6, 2))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x @ self.down.T @ self.up.T


class ScaledEmbedding(nn.Embedding):
    """Gemma's table."""

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) * 4.0


class PaddingConv(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return functional.conv2d(functional.pad(x, (1, 1, 1, 1)), self.weight, self.bias)


class StandardizedConv(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return functional.conv2d(x, weight, self.bias)


class UnitRows(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, functional.normalize(self.weight, dim=1))


class ChannelsFirstNorm(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Attention(nn.Module):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(10, 2, dropout, batch_first=True)
        self.head = nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.attention(x, x, x, need_weights=False)[0].mean(1))


class ClassToken(nn.Module):
    """A token that is put before every sequence, and LayerScale."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, 10))
        self.mix = nn.Linear(10, 10)
        self.scale = nn.Parameter(torch.full((10,), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1)
        return x + self.scale * self.mix(x).cumsum(1).tanh()


class FunctionalHead(nn.Module):
    """The head's weight is the table's, read by a function."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 6)
        self.mix = nn.Linear(6, 6)

    def forward(self, ids: Tensor) -> Tensor:
        return functional.linear(self.mix(self.table(ids)).tanh(), self.table.weight)


class Positions(nn.Module):
    """Positions that are looked up once for all samples, as many as there are samples."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(7, 6)
        self.places = nn.Embedding(9, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, ids: Tensor) -> Tensor:
        places = self.places(torch.arange(ids.shape[1]))
        return self.head((self.words(ids) + places).tanh().cumsum(1))


class PositionsInFront(Positions):
    """The same with a first dimension that is added later."""

    def forward(self, ids: Tensor) -> Tensor:
        places = self.places(torch.arange(ids.shape[1]))[None]
        return self.head((self.words(ids) + places).tanh().cumsum(1))


class TokenAndPositions(Positions):
    """CLIP's images: a class token, and positions that are looked up once for all samples."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(6))

    def forward(self, ids: Tensor) -> Tensor:
        x = torch.cat([self.token.expand(len(ids), 1, -1), self.words(ids)], 1)
        return self.head((x + self.places(torch.arange(x.shape[1])[None])).tanh().cumsum(1))


class InPlace(nn.Module):
    """Outputs that are views (a linear map's over positions is one), changed in place."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(10, 6)
        self.second = _Transposed()
        self.third = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        out = self.first(x)
        out += out.detach().tanh()
        out = self.second(out)
        out *= 2.0
        out = self.third(out)
        return torch.relu_(out)


class _Transposed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 5, 1))

    def forward(self, x: Tensor) -> Tensor:
        return (x.permute(2, 1, 0) * self.weight).permute(2, 1, 0)


class TimeFirst(nn.Module):
    """Layers work on `time batch features`, as is the default of torch's sequence models."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(7, 6)
        self.norm = nn.LayerNorm(6)
        self.cell = nn.GRU(6, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.cell(self.norm(self.words(ids).transpose(0, 1)))[0]
        return self.head(x.tanh().cumsum(0)).transpose(0, 1)


class Prototypes(nn.Module):
    """Class vectors go through a layer that no sample goes through."""

    def __init__(self) -> None:
        super().__init__()
        self.image = nn.Linear(10, 6)
        self.text = nn.Linear(5, 6)
        self.register_buffer("classes", torch.randn(4, 5))

    def forward(self, x: Tensor) -> Tensor:
        return self.image(x) @ self.text(self.classes).T


class Experts(nn.Module):
    """A mixture of experts over flattened tokens, whose weights are one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(10, 3)
        self.experts = _FlatExperts()

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, 1)
        return self.experts(flat, self.gate(flat).softmax(1)).view_as(x)


class _FlatExperts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.randn(3, 10, 10) / 3)

    def forward(self, x: Tensor, shares: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        best = shares.argmax(1)
        for expert, weight in enumerate(self.weights):
            chosen = (best == expert).nonzero().flatten()
            out = out.index_add(0, chosen, shares[chosen, expert, None] * (x[chosen] @ weight))
        return out


class ListedExperts(nn.Module):
    """The same with a layer per expert, which sees the tokens that were sent to it."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(10, 3)
        self.experts = nn.ModuleList(nn.Linear(10, 10) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, 1)
        shares = self.gate(flat).softmax(1)
        best = shares.argmax(1)
        out = torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            chosen = (best == number).nonzero().flatten()
            out = out.index_add(0, chosen, shares[chosen, number, None] * expert(flat[chosen]))
        return out.view_as(x)


class SortedExperts(nn.Module):
    """Experts over the tokens of all samples, sorted by expert, as in JetMoe."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(10, 3)
        self.experts = _ParallelExperts()

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, 1)
        shares, best = self.gate(flat).softmax(1).max(1)
        order = best.argsort(stable=True)
        out = self.experts(flat[order], best.bincount(minlength=3).tolist())
        return (out[order.argsort()] * shares[:, None]).view_as(x)


class _ParallelExperts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.randn(3, 10, 10) / 3)

    def forward(self, x: Tensor, counts: list[int]) -> Tensor:
        parts = zip(x.split(counts), self.weights, strict=True)
        return torch.cat([part @ weight for part, weight in parts])


class Routed(nn.Module):
    """A router that returns logits and the scores computed from them, and one of them twice."""

    def __init__(self) -> None:
        super().__init__()
        self.router = _Router()

    def forward(self, x: Tensor) -> Tensor:
        logits, scores, same = self.router(x)
        return scores.cumsum(1) + 0.1 * logits * same


class _Router(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 10))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = x @ self.weight.T
        return logits, logits.softmax(-1), logits


class KeepsState(nn.Module):
    """A recurrence that keeps a state for every sample of the last batch, as in RecurrentGemma."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(10))
        self.state: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        assert self.state is not None
        if len(x) != len(self.state):
            raise RuntimeError("another number of samples")
        out = (x.cumsum(1) * self.weight).tanh() + 0 * self.state[:, None]
        self.state = out[:, -1].detach()
        return out


class Stateful(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = KeepsState()

    def forward(self, x: Tensor) -> Tensor:
        self.inner.state = torch.zeros_like(x[:, 0])
        return self.inner(x)


class TiedHead(nn.Module):
    """BERT's head: its weight is the table's, and its bias belongs to the module around it."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 6)
        self.bias = nn.Parameter(torch.randn(7))
        self.head = nn.Linear(6, 7)
        self.head.weight = self.table.weight
        self.head.bias = self.bias

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.table(ids).cumsum(1).tanh())


class PositionsByShape(Positions):
    """Blenderbot's positions: the table is called with a shape."""

    def __init__(self) -> None:
        super().__init__()
        self.places = _ShapeTable(9, 6)

    def forward(self, ids: Tensor) -> Tensor:
        places = self.places(ids.shape, places=None)
        return self.head((self.words(ids) + places).tanh().cumsum(1))


class _ShapeTable(nn.Embedding):
    def forward(  # type: ignore[override]
        self, shape: torch.Size, places: Tensor | None
    ) -> Tensor:
        return super().forward(torch.arange(shape[1]) if places is None else places)


class Frames(nn.Module):
    """Frames of a film that pass through a convolution as if each were a sample."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(10, 4, 3, padding=1)
        self.norm = nn.GroupNorm(2, 4)

    def forward(self, x: Tensor) -> Tensor:
        frames = x.unflatten(2, (5, 2)).transpose(1, 2).flatten(0, 1).repeat(1, 2, 1)
        return self.norm(self.conv(frames)).unflatten(0, (len(x), -1)).cumsum(1)


class Twice(nn.Module):
    """A bare parameter that two modules share, and a norm that is no known one."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.PReLU(5)
        self.second = nn.PReLU(5)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).cumsum(1) - 1)


MODULES: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "weight_norm": (lambda: mlp(parametrizations.weight_norm(nn.Linear(10, 6))), vector),
    "spectral_norm": (
        lambda: mlp(parametrizations.spectral_norm(nn.Linear(10, 6))).eval(),
        vector,
    ),
    "orthogonal": (lambda: mlp(parametrizations.orthogonal(nn.Linear(10, 6))), vector),
    "old weight_norm": (lambda: mlp(nn.utils.weight_norm(nn.Linear(10, 6))), vector),
    "weight_norm of a convolution": (
        lambda: parametrizations.weight_norm(nn.Conv1d(5, 4, 3)),
        sequence,
    ),
    "low rank": (lambda: mlp(LowRankLinear()), vector),
    "convolution that pads": (lambda: PaddingConv(3, 4, 3), image),
    "standardized convolution": (lambda: StandardizedConv(3, 4, 3), image),
    "rows of unit length": (lambda: mlp(UnitRows(10, 6, bias=False)), vector),
    "norm over channels": (lambda: ChannelsFirstNorm(3), image),
    "scaled embedding": (lambda: nn.Sequential(ScaledEmbedding(7, 6), nn.Linear(6, 3)), words),
    "attention": (Attention, sequence),
    "encoder layer": (
        lambda: nn.TransformerEncoderLayer(10, 2, 16, 0.0, batch_first=True),
        sequence,
    ),
    "LSTM": (lambda: Unpacked(nn.LSTM(10, 6, 2, batch_first=True)), sequence),
    "GRU": (lambda: Unpacked(nn.GRU(10, 6, batch_first=True, bidirectional=True)), sequence),
    "GRU cell": (lambda: nn.GRUCell(10, 6), vector),
    "transposed convolution": (lambda: nn.ConvTranspose1d(5, 4, 3, stride=2), sequence),
    "transposed convolution 2d": (lambda: nn.ConvTranspose2d(3, 4, 3, groups=1), image),
    "convolution 3d": (lambda: nn.Sequential(Unsqueeze(), nn.Conv3d(1, 4, 2)), image),
    "PReLU": (lambda: nn.Sequential(nn.Linear(10, 10), nn.PReLU()), sequence),
    "instance norm": (lambda: nn.InstanceNorm1d(5, affine=True), sequence),
    "embedding bag": (lambda: nn.EmbeddingBag(7, 4), words),
    "bilinear": (lambda: Paired(nn.Bilinear(10, 10, 3)), vector),
    "class token and LayerScale": (ClassToken, sequence),
    "head by a function": (FunctionalHead, words),
    "positions once for all": (Positions, words),
    "positions with a first dimension": (PositionsInFront, words),
    "a class token beside positions": (TokenAndPositions, words),
    "views changed in place": (InPlace, sequence),
    "time first": (TimeFirst, words),
    "prototypes": (Prototypes, vector),
    "experts in one tensor": (Experts, sequence),
    "experts in a list": (ListedExperts, sequence),
    "experts over sorted tokens": (SortedExperts, sequence),
    "outputs computed from one another": (Routed, sequence),
    "a state with the batch's shape": (Stateful, sequence),
    "a tied head with a bias from elsewhere": (TiedHead, words),
    "positions by shape": (PositionsByShape, words),
    "frames": (Frames, sequence),
    "a shared bare parameter": (Twice, sequence),
}


class Unpacked(nn.Module):
    """The outputs of a recurrent layer, without its state."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)[0]


class Paired(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x, x.flip(1))


class Unsqueeze(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x[:, None]


@pytest.mark.parametrize("name", MODULES)
def test_contributions_are_autograds(name: str) -> None:
    torch.manual_seed(0)
    warnings.simplefilter("ignore", FutureWarning)
    make, inputs = MODULES[name]
    model = make().double()
    x = inputs()
    for limit in (1e-12, 1e-12):  # the second time the way of differentiating is known
        assert relative(captured(model, squares, x), one_by_one(model, squares, x)) < limit


def test_a_tied_bias_is_in_one_block() -> None:
    blocks = bind_layers(TiedHead()).blocks
    assert sorted(name for block in blocks for name in block.parameters) == ["bias", "table.weight"]


@pytest.mark.parametrize("length", [4, 5])
@pytest.mark.parametrize("make", [Positions, PositionsInFront, TimeFirst])
def test_as_many_positions_as_samples(make: Callable[[], nn.Module], length: int) -> None:
    """A regression: samples and positions were exchanged, and the sums agreed."""
    torch.manual_seed(0)
    model = make().double()
    ids = torch.randint(7, (4, length))
    assert relative(captured(model, squares, ids), one_by_one(model, squares, ids)) < 1e-12


def test_a_forward_that_draws_random_numbers() -> None:
    """Each sample's contribution is that of the forward pass that was differentiated."""
    model = Attention(dropout=0.5).double().train()
    x = sequence()
    seen = []

    def losses(model: nn.Module, inputs: Tensor) -> Tensor:
        if len(inputs) == 4:  # the pass that is captured
            torch.manual_seed(3)
        values = squares(model, inputs)
        seen.append(values.detach())
        return values

    actual = captured(model, losses, x)
    torch.manual_seed(3)
    whole = squares(model, x)
    torch.testing.assert_close(whole.detach(), seen[-1])
    names = [n for block in bind_layers(model).blocks for n in block.parameters]
    parameters = [model.get_parameter(name) for name in names]
    rows = [torch.autograd.grad(loss, parameters, retain_graph=True) for loss in whole]
    for row, gradients in zip(actual, rows, strict=True):
        assert float(row.norm()) == pytest.approx(
            float(torch.cat([g.flatten() for g in gradients]).norm())
        )


def test_a_parameter_read_outside_the_model_is_refused() -> None:
    model = nn.Sequential(nn.Linear(10, 6))
    model.register_parameter("temperature", nn.Parameter(torch.ones(())))

    def losses(model: nn.Module, inputs: Tensor) -> Tensor:
        return model(inputs).mean(1) * model.get_parameter("temperature")

    with pytest.raises(SecateurError, match="temperature is read outside the model's forward"):
        captured(model, losses, vector().float())


def test_a_parameter_without_a_shape_is_refused() -> None:
    with pytest.raises(SecateurError, match=r"0\.weight has no shape yet"):
        bind_layers(nn.Sequential(nn.LazyLinear(6)))

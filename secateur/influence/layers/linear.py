"""Room `secateur.layers`: linear maps, stored either way round."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from secateur.influence.blocks import Piece, make_piece
from secateur.influence.captures import OuterCapture
from secateur.influence.layers.registry import LayerFamily, register_layer


@register_layer(nn.Linear)
class Linear(LayerFamily):
    """`y = x W^T + b`; positions are all dimensions between the sample and the features."""

    transposed = False

    def pieces(self, module: nn.Module) -> tuple[int, tuple[Piece, ...]]:
        weight = module.weight
        assert isinstance(weight, Tensor)
        rows = weight.shape[1] if self.transposed else weight.shape[0]
        own = [make_piece("weight", weight, rows, self.transposed)]
        if isinstance(module.bias, Tensor):
            own.append(make_piece("bias", module.bias, rows))
        return rows, tuple(own)

    def capture(self, module: nn.Module, inputs: tuple[Any, ...], gradient: Tensor) -> OuterCapture:
        return OuterCapture(
            _positions(gradient), _positions(inputs[0]), ones=module.bias is not None
        )


@register_layer("transformers.pytorch_utils.Conv1D")
class TransposedLinear(Linear):
    """`y = x W + b`, as in Hugging Face's GPT-2."""

    transposed = True


def _positions(tensor: Tensor) -> Tensor:
    """`batch positions features`."""
    return (
        tensor[:, None] if tensor.dim() == 2 else tensor.reshape(len(tensor), -1, tensor.shape[-1])
    )

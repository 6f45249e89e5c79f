"""Linear maps, whichever way the weight is stored."""

from __future__ import annotations

from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from secateur.influence.blocks import Piece, make_piece
from secateur.influence.captures import OuterCapture
from secateur.influence.layers.registry import LayerFamily, register_layer


@register_layer(nn.Linear)
class LinearFamily(LayerFamily):
    """`y = x W^T + b`. Positions are all dimensions between the sample and the features."""

    transposed = False
    autocasts = True

    def pieces(self, module: nn.Module) -> tuple[int, tuple[Piece, ...]]:
        weight = module.weight
        assert isinstance(weight, Tensor)
        rows = weight.shape[1] if self.transposed else weight.shape[0]
        own = [make_piece("weight", weight, rows, self.transposed)]
        if isinstance(module.bias, Tensor):
            own.append(make_piece("bias", module.bias, rows))
        return rows, tuple(own)

    def capture(self, module: nn.Module, inputs: tuple[Any, ...], gradient: Tensor) -> OuterCapture:
        left = _flatten_positions(gradient)
        right = _flatten_positions(inputs[0])
        return OuterCapture(left, right, ones=module.bias is not None)


@register_layer("transformers.pytorch_utils.Conv1D")
class TransposedLinearFamily(LinearFamily):
    """`y = x W + b`, as in Hugging Face's GPT-2."""

    transposed = True


def _flatten_positions(tensor: Tensor) -> Float[Tensor, "batch positions features"]:
    if tensor.dim() == 2:
        return tensor[:, None]
    return tensor.reshape(len(tensor), -1, tensor.shape[-1])

"""Convolutions, as linear maps of the patches that they read."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from secateur.influence.blocks import Piece, make_piece
from secateur.influence.captures import DenseCapture, OuterCapture, widen
from secateur.influence.layers.registry import LayerFamily, register_layer


@register_layer(nn.Conv1d, nn.Conv2d)
class ConvolutionFamily(LayerFamily):
    """One position per place of the output. Its right factor is the input patch of that place."""

    autocasts = True

    def pieces(self, module: nn.Module) -> tuple[int, tuple[Piece, ...]]:
        assert isinstance(module, nn.Conv1d | nn.Conv2d)
        rows = module.out_channels
        own = [make_piece("weight", module.weight, rows)]
        if module.bias is not None:
            own.append(make_piece("bias", module.bias, rows))
        return rows, tuple(own)

    def capture(
        self, module: nn.Module, inputs: tuple[Any, ...], gradient: Tensor
    ) -> OuterCapture | DenseCapture:
        assert isinstance(module, nn.Conv1d | nn.Conv2d)
        patches = _patches(module, inputs[0])
        left = gradient.flatten(2).transpose(1, 2)
        if module.groups == 1:
            return OuterCapture(left, patches.transpose(1, 2), ones=module.bias is not None)
        # Each group's outputs read only that group's patches, so one outer product would be wrong.
        left = widen(left).unflatten(2, (module.groups, -1))
        grouped = widen(patches).unflatten(1, (module.groups, -1))
        values = torch.einsum("bsgo,bgcs->bgoc", left, grouped).flatten(1, 2)
        if module.bias is not None:
            values = torch.cat([values, left.flatten(2).sum(1)[..., None]], 2)
        return DenseCapture(values)


def _patches(
    module: nn.Conv1d | nn.Conv2d, inputs: Tensor
) -> Float[Tensor, "batch entries positions"]:
    """Return the input patch of each place of the output, entries in the order of the weight."""
    padding = module._reversed_padding_repeated_twice
    if module.padding != "valid" and any(padding):
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        inputs = functional.pad(inputs, padding, mode=mode)
    if isinstance(module, nn.Conv2d):
        return functional.unfold(inputs, module.kernel_size, module.dilation, 0, module.stride)
    # `unfold` takes images only, so a sequence becomes an image of one row.
    kernel = (1, *module.kernel_size)
    dilation = (1, *module.dilation)
    stride = (1, *module.stride)
    return functional.unfold(inputs[:, :, None], kernel, dilation, 0, stride)

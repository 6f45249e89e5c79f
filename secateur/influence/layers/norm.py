"""Room `secateur.layers`: normalisations; their weight and bias are the two columns of a block."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from secateur.errors import SecateurError
from secateur.influence.blocks import Piece, make_piece
from secateur.influence.captures import DenseCapture
from secateur.influence.layers.registry import LayerFamily, register_layer

HUGGING_FACE_RMS = (
    "transformers.models.llama.modeling_llama.LlamaRMSNorm",
    "transformers.models.mistral.modeling_mistral.MistralRMSNorm",
    "transformers.models.qwen2.modeling_qwen2.Qwen2RMSNorm",
    "transformers.models.qwen3.modeling_qwen3.Qwen3RMSNorm",
    "transformers.models.t5.modeling_t5.T5LayerNorm",
)


class Norm(LayerFamily):
    """`y = w x_hat + b`, entry by entry: `C_i = [sum_s delta_s x_hat_s, sum_s delta_s]`."""

    def pieces(self, module: nn.Module) -> tuple[int, tuple[Piece, ...]]:
        weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
        held = [(n, p) for n, p in (("weight", weight), ("bias", bias)) if isinstance(p, Tensor)]
        rows = held[0][1].numel() if held else 0
        return rows, tuple(make_piece(name, parameter, rows) for name, parameter in held)

    def capture(self, module: nn.Module, inputs: tuple[Any, ...], gradient: Tensor) -> DenseCapture:
        columns = []
        if getattr(module, "weight", None) is not None:
            columns.append(self.by_sample(module, gradient * self.normalised(module, inputs[0])))
        if getattr(module, "bias", None) is not None:
            columns.append(self.by_sample(module, gradient))
        return DenseCapture(torch.stack(columns, 2))

    def normalised(self, module: nn.Module, inputs: Tensor) -> Tensor:
        """`x_hat`, before weight and bias."""
        raise SecateurError(f"{type(self).__name__} does not say how it normalises")

    def by_sample(self, module: nn.Module, values: Tensor) -> Tensor:
        """`batch rows`: the sum over positions; features stand last."""
        weight = module.weight if module.weight is not None else module.bias
        assert isinstance(weight, Tensor)
        return values.reshape(len(values), -1, weight.numel()).sum(1)


@register_layer(nn.LayerNorm)
class LayerNorm(Norm):
    """Over the last dimensions."""

    def normalised(self, module: nn.Module, inputs: Tensor) -> Tensor:
        assert isinstance(module, nn.LayerNorm)
        return functional.layer_norm(inputs, module.normalized_shape, eps=module.eps)


@register_layer(nn.RMSNorm)
class RMSNorm(Norm):
    """Over the last dimensions, by the root of the mean square."""

    def normalised(self, module: nn.Module, inputs: Tensor) -> Tensor:
        assert isinstance(module, nn.RMSNorm)
        return functional.rms_norm(inputs, module.normalized_shape, eps=module.eps)


@register_layer(*HUGGING_FACE_RMS)
class HuggingFaceRMSNorm(Norm):
    """Over the last dimension, computed in float32 as Hugging Face does."""

    def normalised(self, module: nn.Module, inputs: Tensor) -> Tensor:
        epsilon = module.variance_epsilon
        assert isinstance(epsilon, float)
        wide = inputs.float()
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)).to(inputs.dtype)


@register_layer(nn.BatchNorm1d, nn.BatchNorm2d)
class BatchNorm(Norm):
    """By running statistics; in train mode a batch's samples are mixed and no sample has a contribution of its own."""

    def normalised(self, module: nn.Module, inputs: Tensor) -> Tensor:
        assert isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d)
        return functional.batch_norm(
            inputs, module.running_mean, module.running_var, eps=module.eps
        )

    def capture(self, module: nn.Module, inputs: tuple[Any, ...], gradient: Tensor) -> DenseCapture:
        if module.training or getattr(module, "running_mean", None) is None:
            raise SecateurError(
                "BatchNorm in train mode mixes the samples of a batch, so that none has a contribution of its own; put it "
                "in eval mode, or use GroupNorm"
            )
        return super().capture(module, inputs, gradient)

    def by_sample(self, module: nn.Module, values: Tensor) -> Tensor:
        return values.flatten(2).sum(2) if values.dim() > 2 else values


@register_layer(nn.GroupNorm)
class GroupNorm(Norm):
    """Over groups of channels of one sample."""

    def normalised(self, module: nn.Module, inputs: Tensor) -> Tensor:
        assert isinstance(module, nn.GroupNorm)
        return functional.group_norm(inputs, module.num_groups, eps=module.eps)

    def by_sample(self, module: nn.Module, values: Tensor) -> Tensor:
        return values.flatten(2).sum(2) if values.dim() > 2 else values

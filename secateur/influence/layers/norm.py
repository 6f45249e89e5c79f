"""Normalization layers. Their weight and bias are the two columns of a block."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from secateur.errors import SecateurError
from secateur.influence.blocks import Piece, make_piece
from secateur.influence.captures import DenseCapture, widen
from secateur.influence.layers.registry import LayerFamily, register_copies, register_layer

# Given by name, because importing transformers takes seconds.
HUGGING_FACE_RMS = (
    "transformers.models.llama.modeling_llama.LlamaRMSNorm",
    "transformers.models.mistral.modeling_mistral.MistralRMSNorm",
    "transformers.models.qwen2.modeling_qwen2.Qwen2RMSNorm",
    "transformers.models.qwen3.modeling_qwen3.Qwen3RMSNorm",
    "transformers.models.t5.modeling_t5.T5LayerNorm",
)


class NormFamily(LayerFamily):
    """`y = w x_hat + b`, entry by entry: `C_i = [sum_s delta_s x_hat_s, sum_s delta_s]`.

    A subclass says how the layer computes `x_hat`, the normalized input.
    """

    def pieces(self, module: nn.Module) -> tuple[int, tuple[Piece, ...]]:
        named = [(name, getattr(module, name, None)) for name in ("weight", "bias")]
        present = [(name, p) for name, p in named if isinstance(p, Tensor)]
        rows = present[0][1].numel() if present else 0
        return rows, tuple(make_piece(name, parameter, rows) for name, parameter in present)

    def capture(self, module: nn.Module, inputs: tuple[Any, ...], gradient: Tensor) -> DenseCapture:
        columns = []
        gradient = widen(gradient)
        if getattr(module, "weight", None) is not None:
            normalized = self.normalize(module, widen(inputs[0]))
            columns.append(self.sum_positions(module, gradient * normalized))
        if getattr(module, "bias", None) is not None:
            columns.append(self.sum_positions(module, gradient))
        return DenseCapture(torch.stack(columns, 2))

    def normalize(self, module: nn.Module, inputs: Tensor) -> Tensor:
        """Return `x_hat`, before weight and bias."""
        raise SecateurError(
            f"{type(self).__name__} does not say how it normalizes; give it a method normalize"
        )

    def sum_positions(self, module: nn.Module, values: Tensor) -> Float[Tensor, "batch rows"]:
        """Return the sum over positions. Features are the last dimensions."""
        weight = module.weight if module.weight is not None else module.bias
        assert isinstance(weight, Tensor)
        return values.reshape(len(values), -1, weight.numel()).sum(1)


@register_layer(nn.LayerNorm)
class LayerNormFamily(NormFamily):
    """Normalization over the last dimensions."""

    def normalize(self, module: nn.Module, inputs: Tensor) -> Tensor:
        assert isinstance(module, nn.LayerNorm)
        return functional.layer_norm(inputs, module.normalized_shape, eps=module.eps)


@register_layer(nn.RMSNorm)
class RMSNormFamily(NormFamily):
    """Division by the root of the mean square over the last dimensions."""

    def normalize(self, module: nn.Module, inputs: Tensor) -> Tensor:
        assert isinstance(module, nn.RMSNorm)
        return functional.rms_norm(inputs, module.normalized_shape, eps=module.eps)


# LlamaRMSNorm's forward, statement by statement, of which 140 classes of transformers 5.23 have a
# copy. A docstring would be a constant that they lack.
def hugging_face_forward(self: Any, hidden_states: Tensor) -> Any:
    input_dtype = hidden_states.dtype
    hidden_states = hidden_states.to(torch.float32)
    variance = hidden_states.pow(2).mean(-1, keepdim=True)
    hidden_states = hidden_states * torch.rsqrt(variance + self.variance_epsilon)
    return self.weight * hidden_states.to(input_dtype)


@register_copies(hugging_face_forward)
@register_layer(*HUGGING_FACE_RMS)
class HuggingFaceRMSNormFamily(NormFamily):
    """The same over the last dimension, computed in float32 as Hugging Face does."""

    def normalize(self, module: nn.Module, inputs: Tensor) -> Tensor:
        epsilon = module.variance_epsilon
        assert isinstance(epsilon, float)
        wide = inputs.float()
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)).to(inputs.dtype)


class ChannelNormFamily(NormFamily):
    """Normalization whose weight has one entry per channel, the second dimension."""

    def sum_positions(self, module: nn.Module, values: Tensor) -> Float[Tensor, "batch rows"]:
        return values.flatten(2).sum(2) if values.dim() > 2 else values


@register_layer(nn.BatchNorm1d, nn.BatchNorm2d)
class BatchNormFamily(ChannelNormFamily):
    """Normalization by running statistics.

    Train mode is refused: it mixes a batch's samples, so no sample has a separate contribution.
    """

    def normalize(self, module: nn.Module, inputs: Tensor) -> Tensor:
        assert isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d)
        return functional.batch_norm(
            inputs, module.running_mean, module.running_var, eps=module.eps
        )

    def capture(self, module: nn.Module, inputs: tuple[Any, ...], gradient: Tensor) -> DenseCapture:
        if module.training or getattr(module, "running_mean", None) is None:
            raise SecateurError(
                "BatchNorm in train mode mixes the samples of a batch, so no sample has a separate "
                "contribution; put it in eval mode, or use GroupNorm"
            )
        return super().capture(module, inputs, gradient)


@register_layer(nn.GroupNorm)
class GroupNormFamily(ChannelNormFamily):
    """Normalization over groups of channels of one sample."""

    def normalize(self, module: nn.Module, inputs: Tensor) -> Tensor:
        assert isinstance(module, nn.GroupNorm)
        return functional.group_norm(inputs, module.num_groups, eps=module.eps)

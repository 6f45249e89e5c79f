"""Embedding tables."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from secateur.errors import SecateurError
from secateur.influence.blocks import Piece, make_piece
from secateur.influence.captures import LookupCapture
from secateur.influence.layers.registry import LayerFamily, register_layer


@register_layer(nn.Embedding)
class EmbeddingFamily(LayerFamily):
    """Tables whose rows are looked up. The padding row gets no gradient."""

    def pieces(self, module: nn.Module) -> tuple[int, tuple[Piece, ...]]:
        assert isinstance(module, nn.Embedding)
        for setting in ("max_norm", "scale_grad_by_freq", "sparse"):
            if getattr(module, setting):
                raise SecateurError(
                    f"an Embedding with {setting} cannot be captured; leave {setting} at its "
                    f"default"
                )
        return module.num_embeddings, (make_piece("weight", module.weight, module.num_embeddings),)

    def capture(
        self, module: nn.Module, inputs: tuple[Any, ...], gradient: Tensor
    ) -> LookupCapture:
        assert isinstance(module, nn.Embedding)
        ids = inputs[0].reshape(len(inputs[0]), -1)
        right = gradient.reshape(*ids.shape, -1)
        if module.padding_idx is not None:
            right = right * (ids != module.padding_idx)[..., None]
        return LookupCapture(ids, right, module.num_embeddings)

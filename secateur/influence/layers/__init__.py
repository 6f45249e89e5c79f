"""Layer families: how each kind of layer is captured, one small module each.

A family says how a layer's parameters form a block, and what a call of the layer contributed.
`registry` shows how to add a family for another layer.
"""

from secateur.influence.layers import conv, embedding, linear, norm
from secateur.influence.layers.registry import LayerFamily, find_layer_family, register_layer

__all__ = [
    "LayerFamily",
    "conv",
    "embedding",
    "find_layer_family",
    "linear",
    "norm",
    "register_layer",
]

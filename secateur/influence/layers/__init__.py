"""Room `secateur.layers`: which layers can be captured; one small module a family, and this registry.

A family says how a layer's parameters form a block, and what a call contributed. Add your own::

    @register_layer(MyLayer)
    class MyFamily(Family): ...
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

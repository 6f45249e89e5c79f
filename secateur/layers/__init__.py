"""Room `secateur.layers`: which layers can be captured; one small module a family, and this registry.

A family says how a layer's parameters form a block, and what a call contributed. Add your own::

    @register_layer(MyLayer)
    class MyFamily(Family): ...
"""

from secateur.layers import conv, embedding, linear, norm
from secateur.layers.registry import Family, family_of, register_layer

__all__ = ["Family", "conv", "embedding", "family_of", "linear", "norm", "register_layer"]

"""The registry of layer families, by layer class.

To capture another layer, say in a subclass of `LayerFamily` which parameters form its block and
what each sample of a call contributed to their gradient. For a layer `Scale(nn.Module)` that
multiplies its input `batch features` by a parameter `weight` of shape `features`::

    from secateur.influence.blocks import make_piece
    from secateur.influence.captures import DenseCapture
    from secateur.influence.layers import LayerFamily, register_layer

    @register_layer(Scale)
    class ScaleFamily(LayerFamily):
        def pieces(self, module):
            rows = module.weight.numel()
            return rows, (make_piece("weight", module.weight, rows),)

        def capture(self, module, inputs, gradient):
            return DenseCapture((gradient * inputs[0])[:, :, None])  # batch x rows x columns

A layer without a family is captured by differentiating its own forward for each sample, which needs
no code. A family is worth writing where that is too slow.

A layer that is a linear map of its inputs gives an `OuterCapture` of output gradients and inputs
instead. It is never multiplied out if the basis does not need it. The module that registers a
family must be imported before the model's layers are bound.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from secateur.influence.blocks import Piece
from secateur.influence.captures import Capture


class LayerFamily(ABC):
    """How layers of one kind are captured.

    Attributes:
        autocasts: whether the layer computes in autocast's precision where autocast is on.
    """

    autocasts: ClassVar[bool] = False

    @abstractmethod
    def pieces(self, module: nn.Module) -> tuple[int, tuple[Piece, ...]]:
        """Return the rows of the layer's block, and one piece per parameter.

        The weight's piece is first. Each is named as in the module itself.

        Raises:
            SecateurError: the layer has a setting that cannot be captured.
        """

    @abstractmethod
    def capture(self, module: nn.Module, inputs: tuple[Any, ...], gradient: Tensor) -> Capture:
        """Return the contribution of each sample of one call.

        Args:
            inputs: the call's arguments.
            gradient: of the loss with respect to the call's output; the first dimension is the
                sample.

        Raises:
            SecateurError: the layer's setting mixes the samples of a batch.
        """


Family = TypeVar("Family", bound=LayerFamily)

_families: dict[type[nn.Module] | str, LayerFamily] = {}
_forwards: dict[tuple[Any, ...], LayerFamily] = {}  # by what a forward does


def register_layer(*kinds: type[nn.Module] | str) -> Callable[[type[Family]], type[Family]]:
    """Register a family for layer classes, as a decorator of the family's class.

    Args:
        kinds: layer classes, or their full names `module.Class` if importing them takes long.
    """

    def register(family: type[Family]) -> type[Family]:
        for kind in kinds:
            _families[kind] = family()
        return family

    return register


def register_copies(forward: Callable[..., Any]) -> Callable[[type[Family]], type[Family]]:
    """Register a family for every class whose `forward` is a copy of a function.

    A copy has the same bytecode, constants and names, and means the same `torch`.

    Args:
        forward: the function.
    """

    def register(family: type[Family]) -> type[Family]:
        _forwards[_code(forward)] = family()
        return family

    return register


def _code(forward: Callable[..., Any]) -> tuple[Any, ...]:
    """Return what a function does, or nothing if it is not written in Python."""
    forward = inspect.unwrap(forward)
    code = getattr(forward, "__code__", None)
    if code is None:
        return ()
    globals_: dict[str, Any] = getattr(forward, "__globals__", {})
    same_torch = globals_.get("torch") is torch
    return code.co_code, code.co_consts, code.co_names, code.co_freevars, same_torch


def find_layer_family(module: nn.Module) -> LayerFamily | None:
    """Return the family of a layer's class or nearest base class, or None if there is none.

    A class whose forward is a copy of another's (`register_copies`) has that one's family. One that
    overrides the `forward` of its base class is not taken for it, and neither is a
    layer whose weight is computed from other parameters (`parametrize`, or the old `weight_norm`,
    which leaves the result among the attributes).
    """
    attributes = vars(module)
    computed = any(isinstance(value, Tensor) for value in attributes.values())
    if "forward" in attributes or computed or is_parametrized(module):
        return None
    for kind in type(module).__mro__:
        family = _families.get(kind) or _families.get(f"{kind.__module__}.{kind.__qualname__}")
        if family and type(module).forward is getattr(kind, "forward", None):
            return family
        if family:
            break
    return _forwards.get(_code(type(module).forward))

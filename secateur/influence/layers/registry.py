"""Room `secateur.layers`: the registry of layer families."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from secateur.influence.blocks import Piece
from secateur.influence.captures import Capture


class LayerFamily(ABC):
    """How layers of one kind are captured."""

    @abstractmethod
    def pieces(self, module: nn.Module) -> tuple[int, tuple[Piece, ...]]:
        """Rows of the layer's block and a piece a parameter, weight first, named as in the module itself."""

    @abstractmethod
    def capture(self, module: nn.Module, inputs: tuple[Any, ...], gradient: Tensor) -> Capture:
        """What a call contributed.

        Args:
            inputs: the call's arguments.
            gradient: of the loss by the call's output, the sample first.

        Raises:
            SecateurError: the layer is set up so that its samples cannot be told apart.
        """


_families: dict[type[nn.Module] | str, LayerFamily] = {}


def register_layer(
    *kinds: type[nn.Module] | str,
) -> Callable[[type[LayerFamily]], type[LayerFamily]]:
    """Registers a family for layer classes, given as classes or as `module.Class` where importing them is dear."""

    def register(family: type[LayerFamily]) -> type[LayerFamily]:
        for kind in kinds:
            _families[kind] = family()
        return family

    return register


def find_layer_family(module: nn.Module) -> LayerFamily | None:
    """The family of a layer, by its class or the nearest of its bases; None where it isn't known."""
    for kind in type(module).__mro__:
        found = _families.get(kind) or _families.get(f"{kind.__module__}.{kind.__qualname__}")
        if found:
            return found
    return None

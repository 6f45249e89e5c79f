"""Sites of a model's modules, made from its blocks."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace

import torch
from jaxtyping import Int
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from secateur.influence.blocks import Block, Piece
from secateur.influence.capture.own_forward import OwnForward
from secateur.influence.capture.sites import (
    Binding,
    CallLayout,
    FamilySite,
    OwnForwardSite,
    Site,
)
from secateur.influence.layers import find_layer_family

# Modules that hold others, or parameters, and are not called with a batch.
CONTAINERS = (
    nn.ModuleList,
    nn.ModuleDict,
    nn.ParameterList,
    nn.ParameterDict,
    ParametrizationList,
)

Layouts = tuple[CallLayout, ...]


class SiteMaker:
    """Makes the sites of a model's modules.

    Args:
        model: the model.
        blocks: the blocks of its captured parameters.
    """

    def __init__(self, model: nn.Module, blocks: Sequence[Block]) -> None:
        self.module_names = {module: name for name, module in model.named_modules()}
        self.parameters = dict(model.named_parameters())
        self.names = {id(p): name for name, p in self.parameters.items()}
        self._blocks = blocks
        self._places = {
            piece.parameter: (index, piece)
            for index, block in enumerate(blocks)
            for piece in block.pieces
        }

    @property
    def captured(self) -> set[str]:
        """Names of the captured parameters."""
        return set(self._places)

    def own_parameters(self, module: nn.Module) -> list[str]:
        """Return the names of the captured parameters that a module owns itself."""
        own = [self.names[id(p)] for p in module.parameters(recurse=False)]
        return [name for name in own if name in self._places]

    def holds(self, module: nn.Module, parameter: str) -> bool:
        """Check whether a parameter belongs to a module or to one within it."""
        return any(p is self.parameters[parameter] for p in module.parameters())

    def family_parameters(self, module: nn.Module) -> set[str]:
        """Return the parameters that a module's family captures; none without a family."""
        own = set(self.own_parameters(module))
        family = find_layer_family(module)
        if family is None or not own:
            return set()
        rows, pieces = family.pieces(module)
        names = set()
        for piece in pieces:
            name = self.names[id(getattr(module, piece.parameter))]
            if name in own:
                index, placed = self._places[name]
                # A tied parameter's block may see it as another matrix.
                if self._blocks[index].rows == rows and placed == replace(piece, parameter=name):
                    names.add(name)
        return names

    def make(
        self,
        module: nn.Module,
        parameters: Collection[str],
        layouts: Layouts = (),
        repeated: bool = False,
    ) -> Iterator[Site]:
        """Yield the sites that capture some parameters at a module's calls."""
        by_family = self.family_parameters(module) & set(parameters)
        if by_family:
            yield self._family_site(module, by_family, layouts, repeated)
        rest = [name for name in parameters if name not in by_family]
        if rest:
            yield self._own_forward_site(module, rest, layouts)

    def _family_site(
        self, module: nn.Module, parameters: set[str], layouts: Layouts, repeated: bool
    ) -> FamilySite:
        family = find_layer_family(module)
        assert family is not None
        _, local = family.pieces(module)
        pieces = [replace(p, parameter=self.names[id(getattr(module, p.parameter))]) for p in local]
        name = self.module_names[module]
        # A tied bias may be in another block than the weight.
        bindings = []
        for index in sorted({self._places[parameter][0] for parameter in parameters}):
            block = self._blocks[index]
            columns = _block_columns(block, pieces, parameters.intersection(block.parameters))
            bindings.append(Binding(name, index, columns))
        return FamilySite(name, module, tuple(bindings), layouts, family, repeated)

    def _own_forward_site(
        self, module: nn.Module, parameters: Sequence[str], layouts: Layouts
    ) -> OwnForwardSite:
        name = self.module_names[module]
        local = {self.names[id(p)]: n for n, p in module.named_parameters()}
        bindings = []
        pieces = []
        for parameter in parameters:
            index, piece = self._places[parameter]
            columns = _block_columns(self._blocks[index], [piece], [parameter])
            bindings.append(Binding(name, index, columns))
            pieces.append((self._blocks[index], piece))
        forward = OwnForward(module, name, [local[parameter] for parameter in parameters])
        return OwnForwardSite(name, module, tuple(bindings), layouts, forward, tuple(pieces))


def default_sites(model: nn.Module, blocks: Sequence[Block]) -> tuple[Site, ...]:
    """Return the sites of a model that has not been traced: the modules that own the parameters.

    For a container's parameters, that is the module that holds the container.
    """
    maker = SiteMaker(model, blocks)
    return tuple(
        site
        for module, parameters in default_owners(model, maker).items()
        for site in maker.make(module, parameters)
    )


def default_owners(model: nn.Module, maker: SiteMaker) -> dict[nn.Module, list[str]]:
    """Return the modules that capture parameters if nothing is known of their calls."""
    modules = dict(model.named_modules())
    owners: dict[nn.Module, list[str]] = {}
    for module_name, module in modules.items():
        name = module_name
        while isinstance(modules[name], CONTAINERS) and name:
            name = name.rpartition(".")[0]
        if own := maker.own_parameters(module):
            # A tied parameter has several owners, and each may read it.
            owners.setdefault(modules[name], []).extend(own)
    return owners


def _block_columns(
    block: Block, pieces: Sequence[Piece], captured: Collection[str]
) -> Int[Tensor, " cols"]:
    """Return the block's column of each column of some pieces, or -1 if that is not captured."""
    starts: dict[str, int] = {}
    width = 0
    for piece in block.pieces:
        starts[piece.parameter] = width
        width += piece.columns
    columns = []
    for piece in pieces:
        if piece.parameter in captured:
            columns.append(starts[piece.parameter] + torch.arange(piece.columns))
        else:
            columns.append(torch.full((piece.columns,), -1))
    return torch.cat(columns)

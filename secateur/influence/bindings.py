"""The captured layers of a model, and the place of their parameters among the blocks."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

import torch
from jaxtyping import Int
from torch import Tensor, nn

from secateur.errors import SecateurError
from secateur.influence.blocks import Block, Piece
from secateur.influence.layers import LayerFamily, find_layer_family


@dataclass(frozen=True)
class Binding:
    """One captured layer and its place among the blocks.

    Attributes:
        module_name: the layer's name in the model.
        module: the layer.
        family: the layer's family.
        block_index: the index of its block.
        columns: the block's column for each column of the layer's captures, or -1 if that is
            frozen.
    """

    module_name: str
    module: nn.Module
    family: LayerFamily
    block_index: int
    columns: Int[Tensor, " cols"]


@dataclass(frozen=True)
class Bindings:
    """Every captured layer of a model, its blocks, and the parameters that are not captured.

    Attributes:
        blocks: the blocks.
        bindings: the captured layers.
        uncaptured: number of elements of each trainable parameter that is not captured.
    """

    blocks: tuple[Block, ...]
    bindings: tuple[Binding, ...]
    uncaptured: dict[str, int]

    def parameters(self) -> list[nn.Parameter]:
        """Return the parameters that the blocks consist of, each once."""
        modules = {binding.module_name: binding.module for binding in self.bindings}
        parameters: dict[int, nn.Parameter] = {}
        for module in modules.values():
            own = module.parameters(recurse=False)
            parameters |= {id(p): p for p in own if p.requires_grad}
        return list(parameters.values())


def bind_layers(model: nn.Module, uncaptured: Collection[str] = ()) -> Bindings:
    """Find the layers to capture.

    Tied parameters share one block, to which all their layers contribute.

    Args:
        model: the model.
        uncaptured: shell-style patterns of parameters that need not be captured.

    Raises:
        SecateurError: a trainable parameter has no known layer and is not listed, or a pattern
            matches nothing.
    """
    names = {id(p): n for n, p in model.named_parameters()}
    blocks: list[Block] = []
    bindings = []
    for module_name, module in model.named_modules():
        family = find_layer_family(module)
        own = [names[id(p)] for p in module.parameters(recurse=False) if p.requires_grad]
        trained = {name for name in own if not _matches_any(name, uncaptured)}
        if family is None or not trained:
            continue
        rows, local_pieces = family.pieces(module)
        pieces = tuple(
            replace(p, parameter=names[id(getattr(module, p.parameter))]) for p in local_pieces
        )
        index = _place_pieces(blocks, rows, [p for p in pieces if p.parameter in trained])
        columns = _block_columns(blocks[index], pieces)
        bindings.append(Binding(module_name, module, family, index, columns))
    captured = {name for block in blocks for name in block.parameters}
    trainable = {n: p.numel() for n, p in model.named_parameters() if p.requires_grad}
    rest = {n: count for n, count in trainable.items() if n not in captured}
    _check_uncaptured(rest, uncaptured, [n for n, _ in model.named_parameters()])
    if not blocks:
        raise SecateurError(
            "the model has no trainable layer that can be captured; register its layers first"
        )
    return Bindings(tuple(blocks), tuple(bindings), rest)


def _place_pieces(blocks: list[Block], rows: int, pieces: list[Piece]) -> int:
    """Add pieces to `blocks` and return the index of their block.

    It is a new block, or, if a parameter is tied, the block that has it already, widened.

    Raises:
        SecateurError: two layers see a tied parameter as different matrices.
    """
    for index, block in enumerate(blocks):
        if set(block.parameters) & {p.parameter for p in pieces}:
            shared = [p for p in pieces if p.parameter in block.parameters]
            if block.rows != rows or any(p not in block.pieces for p in shared):
                raise SecateurError(
                    f"parameter {shared[0].parameter} is shared by layers that see it as different "
                    f"matrices; untie it, or list it under `uncaptured`"
                )
            fresh = tuple(p for p in pieces if p.parameter not in block.parameters)
            blocks[index] = replace(block, pieces=block.pieces + fresh)
            return index
    blocks.append(Block(pieces[0].parameter, rows, tuple(pieces)))
    return len(blocks) - 1


def _block_columns(block: Block, pieces: tuple[Piece, ...]) -> Int[Tensor, " cols"]:
    """Return the block's column of each column of a layer's pieces, or -1 if it has none."""
    starts: dict[str, int] = {}
    width = 0
    for piece in block.pieces:
        starts[piece.parameter] = width
        width += piece.columns
    columns = []
    for piece in pieces:
        start = starts.get(piece.parameter)
        if start is None:
            columns.append(torch.full((piece.columns,), -1))
        else:
            columns.append(start + torch.arange(piece.columns))
    return torch.cat(columns)


def _check_uncaptured(rest: dict[str, int], patterns: Collection[str], names: list[str]) -> None:
    """Check that each uncaptured parameter is listed, and that each pattern matches one.

    Raises:
        SecateurError: one does not.
    """
    unlisted = {n: count for n, count in rest.items() if not _matches_any(n, patterns)}
    if unlisted:
        counts = ", ".join(f"{n} ({count})" for n, count in unlisted.items())
        raise SecateurError(
            f"{len(unlisted)} trainable parameters ({sum(unlisted.values())} elements) belong to "
            f"no layer that can be captured: {counts}; register their layer, freeze them, or list "
            f"them under `uncaptured`"
        )
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise SecateurError(
                f"the pattern {pattern} under `uncaptured` matches no parameter; correct it or "
                f"remove it"
            )


def _matches_any(name: str, patterns: Collection[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)

"""Room `secateur`: which layers of a model are captured, and where each one's parameters stand among the blocks."""

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
    """One layer's place: column j of its captures is column `columns[j]` of its block, or -1 where frozen."""

    module_name: str
    module: nn.Module
    family: LayerFamily
    block_index: int
    columns: Int[Tensor, " cols"]


@dataclass(frozen=True)
class Bindings:
    """Every captured layer of a model, its blocks, and the parameters left out (name: elements)."""

    blocks: tuple[Block, ...]
    bindings: tuple[Binding, ...]
    uncaptured: dict[str, int]

    def parameters(self) -> list[nn.Parameter]:
        """The parameters that the blocks are made of, each once."""
        names = {b.module_name: b.module for b in self.bindings}
        found: dict[int, nn.Parameter] = {}
        for module in names.values():
            found |= {id(p): p for p in module.parameters(recurse=False) if p.requires_grad}
        return list(found.values())


def bind_layers(model: nn.Module, uncaptured: Collection[str] = ()) -> Bindings:
    """Finds the layers to capture. Tied parameters share one block, to which all their layers add.

    Args:
        uncaptured: patterns (as in a shell) of parameters that may be left out.

    Raises:
        SecateurError: a trainable parameter has no known layer and is not listed, or a pattern matches nothing.
    """
    names = {id(p): n for n, p in model.named_parameters()}
    blocks: list[Block] = []
    bindings = []
    for module_name, module in model.named_modules():
        family = find_layer_family(module)
        own = [names[id(p)] for p in module.parameters(recurse=False) if p.requires_grad]
        kept = {name for name in own if not _listed(name, uncaptured)}
        if family is None or not kept:
            continue
        rows, pieces = family.pieces(module)
        pieces = tuple(
            replace(p, parameter=names[id(getattr(module, p.parameter))]) for p in pieces
        )
        index = _block_for(blocks, rows, [p for p in pieces if p.parameter in kept])
        bindings.append(
            Binding(module_name, module, family, index, _columns(blocks[index], pieces))
        )
    captured = {name for block in blocks for name in block.parameters}
    left = {
        n: p.numel() for n, p in model.named_parameters() if p.requires_grad and n not in captured
    }
    _check(left, uncaptured, [n for n, _ in model.named_parameters()])
    if not blocks:
        raise SecateurError(
            "the model has no trainable layer that can be captured; register its layers first"
        )
    return Bindings(tuple(blocks), tuple(bindings), left)


def _block_for(blocks: list[Block], rows: int, pieces: list[Piece]) -> int:
    """The block that holds these pieces: a new one, or the one a tied parameter is in already, widened."""
    for index, block in enumerate(blocks):
        if set(block.parameters) & {p.parameter for p in pieces}:
            shared = [p for p in pieces if p.parameter in block.parameters]
            if block.rows != rows or any(p not in block.pieces for p in shared):
                raise SecateurError(
                    f"parameter {shared[0].parameter} is shared by layers that see it as different matrices; untie it, or "
                    f"list it under `uncaptured`"
                )
            fresh = tuple(p for p in pieces if p.parameter not in block.parameters)
            blocks[index] = replace(block, pieces=block.pieces + fresh)
            return index
    blocks.append(Block(pieces[0].parameter, rows, tuple(pieces)))
    return len(blocks) - 1


def _columns(block: Block, pieces: tuple[Piece, ...]) -> Tensor:
    """The block's column of each column of a layer with these pieces."""
    starts, at = {}, 0
    for own in block.pieces:
        starts[own.parameter] = at
        at += own.columns
    columns = []
    for own in pieces:
        start = starts.get(own.parameter)
        columns.append(
            torch.full((own.columns,), -1) if start is None else start + torch.arange(own.columns)
        )
    return torch.cat(columns)


def _check(left: dict[str, int], patterns: Collection[str], names: list[str]) -> None:
    unlisted = {n: count for n, count in left.items() if not _listed(n, patterns)}
    if unlisted:
        named = ", ".join(f"{n} ({count})" for n, count in unlisted.items())
        raise SecateurError(
            f"{len(unlisted)} trainable parameters ({sum(unlisted.values())} numbers) belong to no layer that can be "
            f"captured: {named}; register their layer, freeze them, or list them under `uncaptured`"
        )
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise SecateurError(
                f"the pattern {pattern} under `uncaptured` matches no parameter; correct or remove it"
            )


def _listed(name: str, patterns: Collection[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)

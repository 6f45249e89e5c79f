"""The captured parameters of a model: their blocks, and the sites at which they are captured."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from jaxtyping import Int
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from secateur.errors import SecateurError
from secateur.influence.blocks import Block, Piece, make_piece
from secateur.influence.capture.choose_sites import find_sites
from secateur.influence.capture.make_sites import default_sites
from secateur.influence.capture.sites import Binding, Site
from secateur.influence.layers import find_layer_family

__all__ = ["Binding", "Bindings", "LossesOf", "bind_layers"]

# The losses of the samples at some places of a batch, each run without the batch's others.
LossesOf = Callable[[Int[Tensor, " n"]], Tensor]


@dataclass
class Bindings:
    """The captured parameters of a model.

    Attributes:
        model: the model.
        blocks: the blocks that the captured parameters form.
        uncaptured: number of elements of each trainable parameter that is not captured.
        sites: the modules at whose calls the parameters are captured.
        located: whether the sites were found by a trace of the model. Otherwise they are the
            modules that own the parameters.
    """

    model: nn.Module
    blocks: tuple[Block, ...]
    uncaptured: dict[str, int]
    sites: tuple[Site, ...]
    located: bool = False

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return the captured parameters by name."""
        names = {name for block in self.blocks for name in block.parameters}
        return {n: p for n, p in self.model.named_parameters() if n in names}

    def locate(self, losses_of: LossesOf, samples: int) -> None:
        """Find the sites by a trace of the model, unless that is done.

        Args:
            losses_of: runs some samples of a batch.
            samples: the number of samples in the batch.

        Raises:
            SecateurError: a parameter is read where it cannot be captured.
        """
        if not self.located:
            self.sites = find_sites(self.model, self.blocks, losses_of, samples)
            self.located = True


def bind_layers(model: nn.Module, uncaptured: Collection[str] = ()) -> Bindings:
    """Arrange the trainable parameters of a model in blocks.

    The weight and the bias of a known layer are one block, and every other parameter is one of its
    own. Tied parameters share one block, to which all their readers contribute.

    Args:
        model: the model; a compiled one is unwrapped.
        uncaptured: shell-style patterns of parameters that need not be captured.

    Raises:
        SecateurError: a layer has a setting that cannot be captured, no parameter is left, or a
            pattern matches nothing.
    """
    model = getattr(model, "_orig_mod", model)
    parameters = dict(model.named_parameters())
    _check_patterns(uncaptured, list(parameters))
    trainable = {n: p for n, p in parameters.items() if p.requires_grad}
    captured = {n: p for n, p in trainable.items() if not _matches_any(n, uncaptured)}
    if not captured:
        raise SecateurError("the model has no trainable parameter to capture")
    _check_initialized(captured)
    blocks = _arrange_blocks(model, captured)
    rest = {n: p.numel() for n, p in trainable.items() if n not in captured}
    return Bindings(model, blocks, rest, default_sites(model, blocks))


def _arrange_blocks(model: nn.Module, captured: Mapping[str, nn.Parameter]) -> tuple[Block, ...]:
    names = {id(p): n for n, p in captured.items()}
    blocks: list[Block] = []
    for module in model.modules():
        family = find_layer_family(module)
        own = {n: p for n, p in module.named_parameters(recurse=False) if id(p) in names}
        pieces: list[Piece] = []
        if family is not None and own:
            rows, local = family.pieces(module)
            pieces = [
                replace(piece, parameter=names[id(own[piece.parameter])])
                for piece in local
                if piece.parameter in own
            ]
            _place_pieces(blocks, rows, pieces)
        placed = {name for block in blocks for name in block.parameters}
        for parameter in own.values():
            name = names[id(parameter)]
            if name not in placed:
                rows = parameter.shape[0] if parameter.dim() else 1
                blocks.append(Block(name, rows, (make_piece(name, parameter, rows),)))
    return tuple(blocks)


def _place_pieces(blocks: list[Block], rows: int, pieces: list[Piece]) -> None:
    """Add pieces to `blocks`: as a new block, or, if a parameter is tied, to the one that has it.

    Pieces of a layer that sees a tied parameter as another matrix are left out. Its other
    parameters then get blocks of their own.
    """
    placed = {name for block in blocks for name in block.parameters}
    fresh = tuple(p for p in pieces if p.parameter not in placed)
    for index, block in enumerate(blocks):
        shared = [p for p in pieces if p.parameter in block.parameters]
        if shared:
            if block.rows == rows and all(p in block.pieces for p in shared):
                blocks[index] = replace(block, pieces=block.pieces + fresh)
            return
    if pieces:
        blocks.append(Block(pieces[0].parameter, rows, tuple(pieces)))


def _check_initialized(parameters: Mapping[str, nn.Parameter]) -> None:
    for name, parameter in parameters.items():
        if is_lazy(parameter):
            raise SecateurError(
                f"parameter {name} has no shape yet; run one batch through the model first"
            )


def _check_patterns(patterns: Collection[str], names: list[str]) -> None:
    """Check that each pattern matches a parameter."""
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise SecateurError(
                f"the pattern {pattern} under `uncaptured` matches no parameter; correct it or "
                f"remove it"
            )


def _matches_any(name: str, patterns: Collection[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)

"""Blocks: the matrices that a model's parameters are seen as."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Piece:
    """One parameter's columns in a block.

    Attributes:
        parameter: its name in the model.
        shape: its shape. Its entries fill `rows x columns` in order.
        columns: the number of its columns.
        transposed: whether it is stored as `[in, out]`; the block has `out` rows.
    """

    parameter: str
    shape: tuple[int, ...]
    columns: int
    transposed: bool = False


@dataclass(frozen=True)
class Block:
    """Parameters that are seen as one matrix: a weight, and its bias as the last column.

    Attributes:
        name: the weight's name in the model.
        rows: the number of rows.
        pieces: the parameters, in the order of their columns.
    """

    name: str
    rows: int
    pieces: tuple[Piece, ...]

    @property
    def cols(self) -> int:
        """Number of columns."""
        return sum(piece.columns for piece in self.pieces)

    @property
    def size(self) -> int:
        """Number of entries."""
        return self.rows * self.cols

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of the parameters."""
        return tuple(piece.parameter for piece in self.pieces)

    def parts(self, tensors: Mapping[str, Tensor]) -> list[Float[Tensor, "rows _"]]:
        """Return the block's columns, one matrix per piece.

        Args:
            tensors: one tensor per parameter: weights, gradients or optimizer slots.
        """
        return [self._piece_matrix(piece, tensors[piece.parameter]) for piece in self.pieces]

    def split(self, matrix: Float[Tensor, "rows cols"]) -> dict[str, Tensor]:
        """Return one tensor per parameter from the whole block. The inverse of `parts`."""
        tensors = {}
        widths = [piece.columns for piece in self.pieces]
        for piece, part in zip(self.pieces, matrix.split(widths, 1), strict=True):
            stored = part.T if piece.transposed else part
            tensors[piece.parameter] = stored.reshape(piece.shape)
        return tensors

    def _piece_matrix(self, piece: Piece, tensor: Tensor) -> Float[Tensor, "rows _"]:
        stored = tensor.T if piece.transposed else tensor
        return stored.reshape(self.rows, piece.columns)


def make_piece(name: str, parameter: Tensor, rows: int, transposed: bool = False) -> Piece:
    """Return the piece that a parameter forms in a block of `rows` rows."""
    return Piece(name, tuple(parameter.shape), math.prod(parameter.shape) // rows, transposed)

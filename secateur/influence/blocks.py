"""Room `secateur`: blocks, the matrices that a model's parameters are seen as."""

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
        shape: its shape; its entries fill `rows x columns` in order.
        columns: how many columns it takes.
        transposed: it is stored as `[in, out]`, and the block has `out` rows.
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
    """

    name: str
    rows: int
    pieces: tuple[Piece, ...]

    @property
    def cols(self) -> int:
        """Columns."""
        return sum(make_piece.columns for make_piece in self.pieces)

    @property
    def size(self) -> int:
        """Entries."""
        return self.rows * self.cols

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of the parameters."""
        return tuple(make_piece.parameter for make_piece in self.pieces)

    def parts(self, tensors: Mapping[str, Tensor]) -> list[Float[Tensor, "rows _"]]:
        """The block's columns, one matrix a piece, of one tensor a parameter: weights, gradients or optimizer slots."""
        held = [(make_piece, tensors[make_piece.parameter]) for make_piece in self.pieces]
        return [
            (t.T if make_piece.transposed else t).reshape(self.rows, make_piece.columns)
            for make_piece, t in held
        ]

    def split(self, matrix: Float[Tensor, "rows cols"]) -> dict[str, Tensor]:
        """One tensor a parameter, from the block; the inverse of `matrix`."""
        parts = matrix.split([make_piece.columns for make_piece in self.pieces], 1)
        return {
            make_piece.parameter: (part.T if make_piece.transposed else part).reshape(
                make_piece.shape
            )
            for make_piece, part in zip(self.pieces, parts, strict=True)
        }


def make_piece(name: str, parameter: Tensor, rows: int, transposed: bool = False) -> Piece:
    """The piece of a block of `rows` rows that a parameter makes."""
    return Piece(name, tuple(parameter.shape), math.prod(parameter.shape) // rows, transposed)

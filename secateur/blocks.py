"""Room `secateur`: blocks, the matrices that a model's parameters are seen as."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
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
        return sum(piece.columns for piece in self.pieces)

    @property
    def size(self) -> int:
        """Entries."""
        return self.rows * self.cols

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of the parameters."""
        return tuple(piece.parameter for piece in self.pieces)

    def matrix(self, tensors: Mapping[str, Tensor]) -> Float[Tensor, "rows cols"]:
        """The block of one tensor a parameter: weights, gradients or a slot of the optimizer."""
        parts = []
        for piece in self.pieces:
            tensor = tensors[piece.parameter]
            parts.append((tensor.T if piece.transposed else tensor).reshape(self.rows, piece.columns))
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)

    def split(self, matrix: Float[Tensor, "rows cols"]) -> dict[str, Tensor]:
        """One tensor a parameter, from the block; the inverse of `matrix`."""
        parts = matrix.split([piece.columns for piece in self.pieces], 1)
        return {
            piece.parameter: (part.T if piece.transposed else part).reshape(piece.shape)
            for piece, part in zip(self.pieces, parts, strict=True)
        }


def piece(name: str, parameter: Tensor, rows: int, transposed: bool = False) -> Piece:
    """The piece of a block of `rows` rows that a parameter makes."""
    return Piece(name, tuple(parameter.shape), math.prod(parameter.shape) // rows, transposed)

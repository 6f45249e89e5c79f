"""Bases, which reduce the contributions to each block to a few coefficients."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise

import torch
from jaxtyping import Float
from torch import Tensor

from secateur.influence.bindings import Binding
from secateur.influence.blocks import Block
from secateur.influence.captures import Capture


class Basis(ABC):
    """A linear map of contributions, gradients and optimizer state to `p` coefficients.

    Attributes:
        blocks: the model's blocks, in the order of their coefficients.
        spans: the coefficients of each block.
        elementwise: whether every coefficient is one real parameter. Then any optimizer that works
            element by element can be followed.
    """

    elementwise: bool

    def __init__(self, blocks: Sequence[Block], sizes: Sequence[int]) -> None:
        self.blocks = tuple(blocks)
        self.spans = tuple(slice(a, b) for a, b in pairwise(accumulate(sizes, initial=0)))

    @property
    def size(self) -> int:
        """Number of coefficients over all blocks, p."""
        last: int = self.spans[-1].stop
        return last

    @abstractmethod
    def project_capture(self, binding: Binding, capture: Capture) -> Float[Tensor, "batch b"]:
        """Return the block's coefficients of each sample's contribution in one call of a layer."""

    @abstractmethod
    def project_block(
        self, block: int, parts: Sequence[Float[Tensor, "rows _"]]
    ) -> Float[Tensor, " b"]:
        """Return the coefficients of a whole gradient or state of a block.

        Args:
            block: the block's index.
            parts: the block's columns, one matrix per piece.
        """

    @abstractmethod
    def lift_block(
        self, block: int, coefficients: Float[Tensor, " b"]
    ) -> Float[Tensor, "rows cols"]:
        """Return the direction in a block that coefficients mean: `project_block` transposed."""

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors that `restore_basis` needs besides the blocks."""

    def project_tensors(self, tensors: Mapping[str, Tensor]) -> Float[Tensor, " p"]:
        """Return the coefficients of one tensor per parameter (gradients, or a state slot)."""
        return torch.cat(
            [self.project_block(i, block.parts(tensors)) for i, block in enumerate(self.blocks)]
        )

    def lift_to_tensors(self, coefficients: Float[Tensor, " p"]) -> dict[str, Tensor]:
        """Return the direction in parameter space of the coefficients, one tensor per parameter."""
        lifted: dict[str, Tensor] = {}
        for i, (block, span) in enumerate(zip(self.blocks, self.spans, strict=True)):
            lifted |= block.split(self.lift_block(i, coefficients[span]))
        return lifted

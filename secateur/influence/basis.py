"""Room `secateur`: bases, the few numbers a block's contributions are reduced to as they are captured (DESIGN, 1)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch
from jaxtyping import Float, Int
from torch import Tensor

from secateur.influence.bindings import Binding
from secateur.influence.blocks import Block
from secateur.influence.captures import Capture


class Basis(ABC):
    """Reduces contributions, gradients and optimizer state of every block to numbers, `p` over all blocks.

    Attributes:
        blocks: the model's blocks, in the order their numbers stand.
        spans: the numbers of each block.
        elementwise: every number is one real parameter, so that any optimizer that works element by element can be
            followed.
    """

    elementwise: bool

    def __init__(self, blocks: Sequence[Block], sizes: Sequence[int]) -> None:
        self.blocks = tuple(blocks)
        ends = torch.tensor([0, *sizes]).cumsum(0).tolist()
        self.spans = tuple(slice(a, b) for a, b in pairwise(ends))

    @property
    def size(self) -> int:
        """Numbers over all blocks, p."""
        return self.spans[-1].stop

    @abstractmethod
    def project_capture(self, binding: Binding, capture: Capture) -> Float[Tensor, "batch b"]:
        """The block's numbers of what one call of a layer contributed."""

    @abstractmethod
    def project_block(self, block: int, parts: Sequence[Float[Tensor, "rows _"]]) -> Float[Tensor, " b"]:
        """The numbers of a whole gradient or state of the block, given as matrices that stand side by side."""

    @abstractmethod
    def lift_block(self, block: int, coefficients: Float[Tensor, " b"]) -> Float[Tensor, "rows cols"]:
        """The direction in the block's parameters that the numbers stand for; the transpose of `project_block`."""

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """What `restore` needs beside the blocks."""

    def project_tensors(self, tensors: Mapping[str, Tensor]) -> Float[Tensor, " p"]:
        """The numbers of one tensor a parameter (gradients, a state slot)."""
        return torch.cat(
            [self.project_block(i, block.parts(tensors)) for i, block in enumerate(self.blocks)]
        )

    def lift_to_tensors(self, coefficients: Float[Tensor, " p"]) -> dict[str, Tensor]:
        """The direction in parameter space, one tensor a parameter."""
        lifted: dict[str, Tensor] = {}
        for i, (block, span) in enumerate(zip(self.blocks, self.spans, strict=True)):
            lifted |= block.split(self.lift_block(i, coefficients[span]))
        return lifted


class KroneckerBasis(Basis):
    """`P_out^T C P_in` with orthonormal columns, for optimizers that treat a block's numbers alike (SGD)."""

    elementwise = False

    def __init__(self, blocks: Sequence[Block], factors: Sequence[tuple[Tensor, Tensor]]) -> None:
        super().__init__(blocks, [out.shape[1] * inner.shape[1] for out, inner in factors])
        self.factors = list(factors)
        self._views: dict[str, Tensor] = {}

    def project_capture(self, binding: Binding, capture: Capture) -> Tensor:
        out, inner = self.factors[binding.block_index]
        view = self._views.get(binding.module_name)
        if view is None:
            view = self._views[binding.module_name] = _rows_or_zero(inner, binding.columns)
        return capture.project(out, view).flatten(1)

    def project_block(self, block: int, parts: Sequence[Tensor]) -> Tensor:
        out, inner = self.factors[block]
        sides = inner.split([part.shape[1] for part in parts])
        found = [out.T @ part.to(out.dtype) @ side for part, side in zip(parts, sides, strict=True)]
        return torch.stack(found).sum(0).flatten()

    def lift_block(self, block: int, coefficients: Tensor) -> Tensor:
        out, inner = self.factors[block]
        return out @ coefficients.view(out.shape[1], inner.shape[1]).to(out.dtype) @ inner.T

    def tensors(self) -> dict[str, Tensor]:
        named: dict[str, Tensor] = {}
        for i, (out, inner) in enumerate(self.factors):
            named |= {f"{i}.out": out.contiguous(), f"{i}.in": inner.contiguous()}
        return named


class CoordinateBasis(Basis):
    """Chosen entries of each block, for any optimizer that works element by element."""

    elementwise = True

    def __init__(self, blocks: Sequence[Block], entries: Sequence[Int[Tensor, " _"]]) -> None:
        super().__init__(blocks, [len(e) for e in entries])
        self.entries = list(entries)
        self._views: dict[str, tuple[Tensor, Tensor, Tensor]] = {}

    def project_capture(self, binding: Binding, capture: Capture) -> Tensor:
        if binding.module_name not in self._views:
            self._views[binding.module_name] = self._view(binding)
        rows, cols, held = self._views[binding.module_name]
        values = capture.entries(rows, cols)
        if len(held) == len(self.entries[binding.block_index]):
            return values
        whole = values.new_zeros(len(values), len(self.entries[binding.block_index]))
        whole[:, held] = values
        return whole

    def _view(self, binding: Binding) -> tuple[Tensor, Tensor, Tensor]:
        """Rows and columns, as the module's capture counts them, of the entries it holds, and which those are."""
        block, entries = self.blocks[binding.block_index], self.entries[binding.block_index]
        column_here = entries.new_full((block.cols,), -1)
        known = (binding.columns >= 0).nonzero().flatten().to(entries.device)
        column_here[binding.columns.to(entries.device)[known]] = known
        cols = column_here[entries % block.cols]
        held = (cols >= 0).nonzero().flatten()
        return (entries // block.cols)[held], cols[held], held

    def project_block(self, block: int, parts: Sequence[Tensor]) -> Tensor:
        matrix = parts[0] if len(parts) == 1 else torch.cat(list(parts), 1)
        return matrix.reshape(-1)[self.entries[block]]

    def lift_block(self, block: int, coefficients: Tensor) -> Tensor:
        matrix = coefficients.new_zeros(self.blocks[block].rows, self.blocks[block].cols)
        matrix.view(-1)[self.entries[block]] = coefficients
        return matrix

    def tensors(self) -> dict[str, Tensor]:
        return {f"{i}.entries": e for i, e in enumerate(self.entries)}


def restore_basis(kind: str, blocks: Sequence[Block], tensors: Mapping[str, Tensor]) -> Basis:
    """The basis that `kind` (`kronecker` or `coordinates`) and its `tensors()` describe."""
    indices = range(len(blocks))
    if kind == "kronecker":
        return KroneckerBasis(blocks, [(tensors[f"{i}.out"], tensors[f"{i}.in"]) for i in indices])
    return CoordinateBasis(blocks, [tensors[f"{i}.entries"] for i in indices])


def basis_kind(basis: Basis) -> str:
    """The name that `restore` knows the basis by."""
    return "coordinates" if basis.elementwise else "kronecker"


def _rows_or_zero(matrix: Tensor, rows: Tensor) -> Tensor:
    """Rows of `matrix`, zero where the index is -1."""
    rows = rows.to(matrix.device)
    return matrix[rows.clamp(min=0)] * (rows >= 0).to(matrix.dtype)[:, None]


def leading_eigenvectors(moment: Float[Tensor, "n n"], rank: int) -> Float[Tensor, "n _"]:
    """The eigenvectors of the `rank` largest eigenvalues, signs fixed so that a rerun finds the same."""
    vectors = torch.linalg.eigh(moment).eigenvectors.flip(1)[:, :rank]
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    return vectors * largest.sign()

"""Bases, which reduce the contributions to each block to a few coefficients."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise

import torch
from jaxtyping import Float, Int
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


class KroneckerBasis(Basis):
    """`P_out^T C P_in` with orthonormal columns.

    For optimizers that treat all coefficients of a block alike (SGD).
    """

    elementwise = False

    def __init__(self, blocks: Sequence[Block], factors: Sequence[tuple[Tensor, Tensor]]) -> None:
        super().__init__(blocks, [out.shape[1] * inner.shape[1] for out, inner in factors])
        self.factors = list(factors)
        self._layer_factors: dict[str, Tensor] = {}

    def project_capture(self, binding: Binding, capture: Capture) -> Float[Tensor, "batch b"]:
        out, inner = self.factors[binding.block_index]
        # Gathering the factor's rows for a layer costs time, and it is the same at every step.
        view = self._layer_factors.get(binding.module_name)
        if view is None:
            view = _rows_or_zero(inner, binding.columns)
            self._layer_factors[binding.module_name] = view
        return capture.project(out, view).flatten(1)

    def project_block(
        self, block: int, parts: Sequence[Float[Tensor, "rows _"]]
    ) -> Float[Tensor, " b"]:
        out, inner = self.factors[block]
        sides = inner.split([part.shape[1] for part in parts])
        products = [
            out.T @ part.to(out.dtype) @ side for part, side in zip(parts, sides, strict=True)
        ]
        return torch.stack(products).sum(0).flatten()

    def lift_block(
        self, block: int, coefficients: Float[Tensor, " b"]
    ) -> Float[Tensor, "rows cols"]:
        out, inner = self.factors[block]
        return out @ coefficients.view(out.shape[1], inner.shape[1]).to(out.dtype) @ inner.T

    def tensors(self) -> dict[str, Tensor]:
        named: dict[str, Tensor] = {}
        for i, (out, inner) in enumerate(self.factors):
            named |= {f"{i}.out": out.contiguous(), f"{i}.in": inner.contiguous()}
        return named


class CoordinateBasis(Basis):
    """Chosen entries of each block. For any optimizer that works element by element."""

    elementwise = True

    def __init__(self, blocks: Sequence[Block], entries: Sequence[Int[Tensor, " _"]]) -> None:
        super().__init__(blocks, [len(e) for e in entries])
        self.entries = list(entries)
        self._layer_entries: dict[str, tuple[Tensor, Tensor, Tensor]] = {}

    def project_capture(self, binding: Binding, capture: Capture) -> Float[Tensor, "batch b"]:
        if binding.module_name not in self._layer_entries:
            self._layer_entries[binding.module_name] = self._entries_of_layer(binding)
        rows, cols, places = self._layer_entries[binding.module_name]
        values = capture.entries(rows, cols)
        size = len(self.entries[binding.block_index])
        if len(places) == size:
            return values
        whole = values.new_zeros(len(values), size)
        whole[:, places] = values
        return whole

    def _entries_of_layer(self, binding: Binding) -> tuple[Tensor, Tensor, Tensor]:
        """Return the basis' entries that are among the columns of a layer's captures.

        Layers whose parameters are tied share a block but have different columns of it.

        Returns:
            Rows and columns of these entries in the layer's captures, and their places in the
            basis.
        """
        block = self.blocks[binding.block_index]
        entries = self.entries[binding.block_index]
        layer_column = entries.new_full((block.cols,), -1)
        trained = (binding.columns >= 0).nonzero().flatten().to(entries.device)
        layer_column[binding.columns.to(entries.device)[trained]] = trained
        cols = layer_column[entries % block.cols]
        places = (cols >= 0).nonzero().flatten()
        return (entries // block.cols)[places], cols[places], places

    def project_block(
        self, block: int, parts: Sequence[Float[Tensor, "rows _"]]
    ) -> Float[Tensor, " b"]:
        matrix = parts[0] if len(parts) == 1 else torch.cat(list(parts), 1)
        return matrix.reshape(-1)[self.entries[block]]

    def lift_block(
        self, block: int, coefficients: Float[Tensor, " b"]
    ) -> Float[Tensor, "rows cols"]:
        matrix = coefficients.new_zeros(self.blocks[block].rows, self.blocks[block].cols)
        matrix.view(-1)[self.entries[block]] = coefficients
        return matrix

    def tensors(self) -> dict[str, Tensor]:
        return {f"{i}.entries": e for i, e in enumerate(self.entries)}


def restore_basis(kind: str, blocks: Sequence[Block], tensors: Mapping[str, Tensor]) -> Basis:
    """Return the basis that `kind` (`kronecker` or `coordinates`) and its `tensors()` describe."""
    indices = range(len(blocks))
    if kind == "kronecker":
        return KroneckerBasis(blocks, [(tensors[f"{i}.out"], tensors[f"{i}.in"]) for i in indices])
    return CoordinateBasis(blocks, [tensors[f"{i}.entries"] for i in indices])


def basis_kind(basis: Basis) -> str:
    """Return the kind of a basis, as `restore_basis` takes it."""
    return "coordinates" if basis.elementwise else "kronecker"


def leading_eigenvectors(moment: Float[Tensor, "n n"], rank: int) -> Float[Tensor, "n _"]:
    """Return the eigenvectors of the `rank` largest eigenvalues, as columns."""
    vectors: Tensor = torch.linalg.eigh(moment).eigenvectors.flip(1)[:, :rank]
    # An eigenvector's sign is arbitrary. Fixed signs make a rerun find the same basis.
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    return vectors * largest.sign()


def _rows_or_zero(matrix: Float[Tensor, "n k"], rows: Int[Tensor, " m"]) -> Float[Tensor, "m k"]:
    """Return rows of `matrix`, zero for each index that is -1."""
    rows = rows.to(matrix.device)
    return matrix[rows.clamp(min=0)] * (rows >= 0).to(matrix.dtype)[:, None]

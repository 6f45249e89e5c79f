"""Bases fitted to the contributions of the first steps of a run."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from secateur.errors import SecateurError
from secateur.influence.bindings import Binding, Bindings
from secateur.influence.captures import Capture
from secateur.influence.coordinate_basis import CoordinateBasis, share_coefficients
from secateur.influence.kronecker_basis import KroneckerBasis

# A second-moment matrix of this many rows takes 0.5 GB in float64, and its eigenvectors take
# minutes.
LARGEST_MOMENT = 8192


class MomentFit:
    """A sum of second moments of output gradients and activations.

    Their leading eigenvectors are a PCA basis.
    """

    def __init__(self, bindings: Bindings) -> None:
        for block in bindings.blocks:
            if max(block.rows, block.cols) > LARGEST_MOMENT:
                raise SecateurError(
                    f"block {block.name} is {block.rows} x {block.cols} and a pca basis takes at "
                    f"most {LARGEST_MOMENT} per side; use `method: random` or `coordinates`, or "
                    f"list it under `uncaptured`"
                )
        self._blocks = bindings.blocks
        self._left = [torch.zeros(b.rows, b.rows, dtype=torch.float64) for b in bindings.blocks]
        self._right = [torch.zeros(b.cols, b.cols, dtype=torch.float64) for b in bindings.blocks]

    def add(self, binding: Binding, capture: Capture) -> None:
        """Add the contributions of one call of a layer."""
        left, right = capture.moments()
        self._left[binding.block_index] += left.cpu().double()
        trained = (binding.columns >= 0).nonzero().flatten()
        columns = binding.columns[trained]
        moment = right.cpu().double()[trained[:, None], trained]
        self._right[binding.block_index][columns[:, None], columns] += moment

    def basis(self, rank: int, dtype: torch.dtype) -> KroneckerBasis:
        """Return the basis of at most `rank` columns per side."""
        factors = [
            (leading_eigenvectors(a, rank).to(dtype), leading_eigenvectors(b, rank).to(dtype))
            for a, b in zip(self._left, self._right, strict=True)
        ]
        return KroneckerBasis(self._blocks, factors)


class EnergyFit:
    """A sum of squared contributions, entry by entry.

    The entries of the largest sums are a coordinate basis.
    """

    def __init__(self, bindings: Bindings) -> None:
        self._blocks = bindings.blocks
        self._energy = [torch.zeros(b.rows, b.cols, dtype=torch.float64) for b in bindings.blocks]

    def add(self, binding: Binding, capture: Capture) -> None:
        """Add the contributions of one call of a layer."""
        trained = (binding.columns >= 0).nonzero().flatten()
        energy = capture.energy().cpu().double()[:, trained]
        self._energy[binding.block_index][:, binding.columns[trained]] += energy

    def basis(self, coefficients: int | None) -> CoordinateBasis:
        """Return the basis of `coefficients` entries, shared equally among blocks; all if None."""
        shares = share_coefficients([block.size for block in self._blocks], coefficients)
        entries = []
        for share, energy in zip(shares, self._energy, strict=True):
            best = energy.flatten().argsort(descending=True, stable=True)[:share]
            entries.append(best.sort().values)
        return CoordinateBasis(self._blocks, entries)


def leading_eigenvectors(moment: Float[Tensor, "n n"], rank: int) -> Float[Tensor, "n _"]:
    """Return the eigenvectors of the `rank` largest eigenvalues, as columns."""
    vectors: Tensor = torch.linalg.eigh(moment).eigenvectors.flip(1)[:, :rank]
    # An eigenvector's sign is arbitrary. Fixed signs make a rerun find the same basis.
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    return vectors * largest.sign()

"""Making a basis: at random, or fitted to the contributions of the first steps of a run."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from secateur.errors import SecateurError
from secateur.influence.basis import CoordinateBasis, KroneckerBasis, leading_eigenvectors
from secateur.influence.bindings import Binding, Bindings
from secateur.influence.captures import Capture

# A second-moment matrix of this many rows takes 0.5 GB in float64, and its eigenvectors take
# minutes.
LARGEST_MOMENT = 8192


def random_kronecker_basis(
    bindings: Bindings, rank: int, seed: int, dtype: torch.dtype
) -> KroneckerBasis:
    """Return a basis of orthonormal random factors.

    Args:
        bindings: the captured layers.
        rank: at most this many columns per side of a block.
        seed: every block and side gets a different seed, derived from this one.
        dtype: of the factors.
    """
    factors = []
    for i, block in enumerate(bindings.blocks):
        sides = []
        for side, size in enumerate((block.rows, block.cols)):
            generator = torch.Generator().manual_seed((seed * 1_000_003 + i) * 2 + side)
            # Always drawn in float64, so that a seed gives the same basis in every precision.
            normal = torch.randn(size, min(rank, size), generator=generator, dtype=torch.float64)
            sides.append(torch.linalg.qr(normal).Q.to(dtype))
        factors.append((sides[0], sides[1]))
    return KroneckerBasis(bindings.blocks, factors)


def random_coordinates(bindings: Bindings, coefficients: int | None, seed: int) -> CoordinateBasis:
    """Return a basis of entries chosen at random.

    Args:
        bindings: the captured layers.
        coefficients: entries over all blocks, shared as in `share_coefficients`; all if None.
        seed: every block gets a different seed, derived from this one.
    """
    shares = share_coefficients([block.size for block in bindings.blocks], coefficients)
    entries = []
    for i, (block, share) in enumerate(zip(bindings.blocks, shares, strict=True)):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + i)
        entries.append(torch.randperm(block.size, generator=generator)[:share].sort().values)
    return CoordinateBasis(bindings.blocks, entries)


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


def share_coefficients(sizes: Sequence[int], coefficients: int | None) -> list[int]:
    """Return how many coefficients each block gets: as many as any other, or all that it has.

    Equal shares kept more of an AdamW run's effects than shares by size, or by energy over all
    blocks, because a loss depends most on small last layers (benchmarks/fidelity.py, workloads C
    and D).

    Args:
        sizes: entries of each block.
        coefficients: the total. Each block gets at least one. If None, each gets all it has.
    """
    if coefficients is None:
        return list(sizes)
    shares = [0] * len(sizes)
    rest = coefficients
    # Smallest blocks first, because the larger ones take the coefficients that these cannot use.
    for rank, block in enumerate(sorted(range(len(sizes)), key=lambda b: sizes[b])):
        shares[block] = min(sizes[block], max(1, rest // (len(sizes) - rank)))
        rest -= shares[block]
    return shares

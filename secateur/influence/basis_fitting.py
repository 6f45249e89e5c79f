"""Room `secateur`: fitting a basis to what the first steps of a run contribute (DESIGN, sections 1 and 7)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from secateur.errors import SecateurError
from secateur.influence.basis import CoordinateBasis, KroneckerBasis, leading_eigenvectors
from secateur.influence.bindings import Binding, Bindings
from secateur.influence.captures import Capture

# A second-moment matrix of this many rows holds 0.5 GB in float64, and its eigenvectors take minutes.
LARGEST_MOMENT = 8192


def random_kronecker_basis(
    bindings: Bindings, rank: int, seed: int, dtype: torch.dtype
) -> KroneckerBasis:
    """Orthonormal random factors, seeded apart for every block and side."""
    factors = []
    for i, block in enumerate(bindings.blocks):
        sides = []
        for side, size in enumerate((block.rows, block.cols)):
            generator = torch.Generator().manual_seed((seed * 1_000_003 + i) * 2 + side)
            drawn = torch.randn(size, min(rank, size), generator=generator, dtype=torch.float64)
            sides.append(torch.linalg.qr(drawn).Q.to(dtype))
        factors.append((sides[0], sides[1]))
    return KroneckerBasis(bindings.blocks, factors)


class MomentFit:
    """Gathers second moments of output gradients and activations; their leading eigenvectors are a PCA basis."""

    def __init__(self, bindings: Bindings) -> None:
        for block in bindings.blocks:
            if max(block.rows, block.cols) > LARGEST_MOMENT:
                raise SecateurError(
                    f"block {block.name} is {block.rows} x {block.cols} and a pca basis takes at most "
                    f"{LARGEST_MOMENT} a side; use `method: random` or `coordinates`, or list it under `uncaptured`"
                )
        self._blocks = bindings.blocks
        self._left = [torch.zeros(b.rows, b.rows, dtype=torch.float64) for b in bindings.blocks]
        self._right = [torch.zeros(b.cols, b.cols, dtype=torch.float64) for b in bindings.blocks]

    def add(self, binding: Binding, capture: Capture) -> None:
        """Takes in what one call of a layer contributed."""
        left, right = capture.moments()
        self._left[binding.block_index] += left.cpu().double()
        here = (binding.columns >= 0).nonzero().flatten()
        columns = binding.columns[here]
        self._right[binding.block_index][columns[:, None], columns] += right.cpu().double()[
            here[:, None], here
        ]

    def basis(self, rank: int, dtype: torch.dtype) -> KroneckerBasis:
        """The basis of at most `rank` numbers a side."""
        pairs = zip(self._left, self._right, strict=True)
        return KroneckerBasis(
            self._blocks,
            [
                (leading_eigenvectors(a, rank).to(dtype), leading_eigenvectors(b, rank).to(dtype))
                for a, b in pairs
            ],
        )


class EnergyFit:
    """Gathers squared contributions entry by entry; the entries of most energy are a coordinate basis."""

    def __init__(self, bindings: Bindings) -> None:
        self._blocks = bindings.blocks
        self._energy = [torch.zeros(b.rows, b.cols, dtype=torch.float64) for b in bindings.blocks]

    def add(self, binding: Binding, capture: Capture) -> None:
        """Takes in what one call of a layer contributed."""
        here = (binding.columns >= 0).nonzero().flatten()
        self._energy[binding.block_index][:, binding.columns[here]] += (
            capture.energy().cpu().double()[:, here]
        )

    def basis(self, coefficients: int | None) -> CoordinateBasis:
        """The basis of `numbers` entries, shared equally among blocks; all entries where it is None."""
        entries = []
        for share, energy in zip(
            share_coefficients([b.size for b in self._blocks], coefficients), self._energy, strict=True
        ):
            best = energy.flatten().argsort(descending=True, stable=True)[:share]
            entries.append(best.sort().values)
        return CoordinateBasis(self._blocks, entries)


def share_coefficients(sizes: Sequence[int], coefficients: int | None) -> list[int]:
    """How many of `numbers` each block gets: as many as any other, or all it has; all of them where it is None.

    Equal shares kept more of an AdamW run's effects than shares by size or by energy over all blocks: small last
    layers answer a loss most (benchmarks/fidelity.py, workloads C and D).
    """
    if coefficients is None:
        return list(sizes)
    found, left = [0] * len(sizes), coefficients
    for rank, block in enumerate(sorted(range(len(sizes)), key=lambda b: sizes[b])):
        found[block] = min(sizes[block], max(1, left // (len(sizes) - rank)))
        left -= found[block]
    return found

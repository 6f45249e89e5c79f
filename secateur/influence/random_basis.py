"""Random bases, and the one that a recorder uses by default."""

from __future__ import annotations

import torch
from jaxtyping import Int
from torch import Tensor

from secateur.influence.basis import Basis
from secateur.influence.basis_kinds import basis_kind, restore_basis
from secateur.influence.bindings import Bindings
from secateur.influence.coordinate_basis import CoordinateBasis, share_coefficients
from secateur.influence.kronecker_basis import KroneckerBasis

# Columns per side of a block in the random basis that a recorder makes for SGD.
RANDOM_RANK = 16
# A permutation of this many entries takes 128 MiB. From larger blocks entries are drawn one by one.
LARGEST_PERMUTATION = 1 << 24


def default_basis(bindings: Bindings, linear: bool, coefficients: int, seed: int) -> Basis:
    """Return the random basis that a recorder uses by default, on the parameters' device.

    Args:
        bindings: the captured layers.
        linear: whether the optimizer's update is linear (SGD). It then gets a Kronecker basis of
            rank 16 per side, any other optimizer a basis of coordinates.
        coefficients: number of coordinates over all blocks.
        seed: as in `random_kronecker_basis` and `random_coordinates`.
    """
    first = next(iter(bindings.parameters().values()))
    basis: Basis
    if linear:
        basis = random_kronecker_basis(
            bindings, RANDOM_RANK, seed, torch.promote_types(first.dtype, torch.float32)
        )
    else:
        basis = random_coordinates(bindings, coefficients, seed)
    tensors = {name: tensor.to(first.device) for name, tensor in basis.tensors().items()}
    return restore_basis(basis_kind(basis), basis.blocks, tensors)


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
        entries.append(_draw_entries(block.size, share, generator).sort().values)
    return CoordinateBasis(bindings.blocks, entries)


def _draw_entries(size: int, count: int, generator: torch.Generator) -> Int[Tensor, " count"]:
    """Draw distinct numbers below `size`."""
    if size <= LARGEST_PERMUTATION or 4 * count > size:
        return torch.randperm(size, generator=generator)[:count]
    # More than enough, because a few of so many numbers are hardly ever drawn twice.
    drawn: Tensor = torch.randint(size, (2 * count + 64,), generator=generator).unique()
    return drawn[torch.randperm(len(drawn), generator=generator)[:count]]

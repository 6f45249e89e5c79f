"""Second moments of vectors: exact for short ones, and a sketch of bounded width for long ones."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

# Of longer vectors only a sketch is kept: the square of this side takes 16 MiB in float32.
LARGEST_SIDE = 2048
# Width of a sketch, as columns per eigenvector and further columns.
SKETCH_FACTOR = 8
SKETCH_EXTRA = 64


class Moment:
    """`M = sum_i v_i v_i^T`, as a square matrix.

    Args:
        side: length of the vectors.
        dtype: of the sums.
        device: of the sums.
    """

    def __init__(self, side: int, dtype: torch.dtype, device: torch.device) -> None:
        self._matrix = torch.zeros(side, side, dtype=dtype, device=device)

    @property
    def nbytes(self) -> int:
        """Bytes of the sums."""
        return self._matrix.nbytes

    def add(self, vectors: Float[Tensor, "n m"], places: Int[Tensor, " m"] | None) -> None:
        """Add vectors, whose entries are at `places` (everywhere if None)."""
        vectors = vectors.to(self._matrix.dtype)
        if places is None:
            self._matrix.addmm_(vectors.T, vectors)
        else:
            self._matrix[places[:, None], places] += vectors.T @ vectors

    def add_diagonal(self, weights: Float[Tensor, " side"]) -> None:
        """Add unit vectors, one per entry, times the root of a weight."""
        self._matrix.diagonal().add_(weights.to(self._matrix.dtype))

    def leading_eigenvectors(self, rank: int) -> Float[Tensor, "side _"]:
        """Return the eigenvectors of the `rank` largest eigenvalues, as columns in float64."""
        return leading_eigenvectors(self._matrix.cpu().double(), rank)


class SketchedMoment:
    """The product of `M` with a fixed random matrix of few columns.

    Its leading eigenvectors are those of the Nystrom approximation `M O (O^T M O)^-1 O^T M` (Tropp
    et al. 2017, Fixed-rank approximation of a positive-semidefinite matrix from streaming data). It
    is exact if the rank of `M` is at most the sketch's width.

    Args:
        side, dtype, device: as in `Moment`.
        rank: the number of eigenvectors that will be asked for.
        seed: of the random matrix.
    """

    def __init__(
        self, side: int, dtype: torch.dtype, device: torch.device, rank: int, seed: int
    ) -> None:
        width = min(side, SKETCH_FACTOR * rank + SKETCH_EXTRA)
        generator = torch.Generator().manual_seed(seed)
        self._random = torch.randn(side, width, generator=generator, dtype=dtype).to(device)
        self._product = torch.zeros_like(self._random)

    @property
    def nbytes(self) -> int:
        """Bytes of the sums and of the random matrix."""
        return 2 * self._product.nbytes

    def add(self, vectors: Float[Tensor, "n m"], places: Int[Tensor, " m"] | None) -> None:
        """Add vectors, whose entries are at `places` (everywhere if None)."""
        vectors = vectors.to(self._product.dtype)
        if places is None:
            self._product.addmm_(vectors.T, vectors @ self._random)
        else:
            self._product[places] += vectors.T @ (vectors @ self._random[places])

    def add_diagonal(self, weights: Float[Tensor, " side"]) -> None:
        """Add unit vectors, one per entry, times the root of a weight."""
        self._product += weights.to(self._product.dtype)[:, None] * self._random

    def leading_eigenvectors(self, rank: int) -> Float[Tensor, "side _"]:
        """Return approximate eigenvectors of the largest eigenvalues, as columns in float64."""
        random = self._random.cpu().double()
        product = self._product.cpu().double()
        # A small multiple of the identity keeps the inverse from amplifying the sums' rounding.
        shift = torch.finfo(self._product.dtype).eps * product.norm()
        product = product + shift * random
        core = random.T @ product
        values, vectors = torch.linalg.eigh((core + core.T) / 2)
        kept = values > torch.finfo(self._product.dtype).eps * values[-1]
        root = torch.where(kept, values, 1).rsqrt() * kept
        left = torch.linalg.svd(product @ (vectors * root), full_matrices=False).U
        return _fix_signs(left[:, :rank])


def leading_eigenvectors(moment: Float[Tensor, "n n"], rank: int) -> Float[Tensor, "n _"]:
    """Return the eigenvectors of the `rank` largest eigenvalues, as columns."""
    vectors: Tensor = torch.linalg.eigh(moment).eigenvectors
    return _fix_signs(vectors.flip(1)[:, :rank])


def _fix_signs(vectors: Float[Tensor, "n k"]) -> Float[Tensor, "n k"]:
    # An eigenvector's sign is arbitrary. Fixed signs make a rerun find the same basis.
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    return vectors * largest.sign()

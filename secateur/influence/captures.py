"""Captures: the contributions of one call of a layer, by sample, in the cheapest form.

Each sample's contribution to a block is a matrix `C_i` of `rows x cols`. It is rarely formed.
Layers give factors of it, and a basis computes from the factors only the coefficients that it
keeps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

# The number of entries formed at a time if whole matrices are needed: 64 MB in float32.
CHUNK_ENTRIES = 1 << 24


HALF_TYPES = (torch.bfloat16, torch.float16)


def widen(tensor: Tensor) -> Tensor:
    """Return the tensor in float32 if it is in half precision, because sums of it follow."""
    return tensor.float() if tensor.dtype in HALF_TYPES else tensor


@dataclass(frozen=True)
class OuterCapture:
    """`C_i = sum_s left_s [right_s, 1]^T`, with the constant column only if `ones` (a bias)."""

    left: Float[Tensor, "batch positions rows"]
    right: Float[Tensor, "batch positions inner"]
    ones: bool = False
    first: ClassVar[int] = 0  # the number of its first sample

    @property
    def batch(self) -> int:
        """Number of samples."""
        return len(self.left)

    def project(
        self, p_out: Float[Tensor, "rows k"], p_in: Float[Tensor, "cols l"]
    ) -> Float[Tensor, "batch k l"]:
        """Return `p_out^T C_i p_in`."""
        inner = self.right.shape[-1]
        left = self.left.to(p_out.dtype) @ p_out
        right = self.right.to(p_in.dtype) @ p_in[:inner]
        if self.ones:
            right = right + p_in[inner]
        return _sum_of_products(left, right)

    def entries(self, rows: Int[Tensor, " k"], cols: Int[Tensor, " k"]) -> Float[Tensor, "batch k"]:
        """Return `C_i[rows, cols]`."""
        height = self.left.shape[-1]
        width = self.right.shape[-1] + self.ones
        # From a quarter of the entries on, the whole matrix costs less than gathered factors, which
        # repeat every position for every entry.
        if self.left.shape[1] > 1 and len(rows) * 4 > height * width:
            return self.dense()[:, rows, cols]
        left = widen(_gather_features(self.left, rows))
        if self.ones:
            right = widen(_gather_features(self.right, cols.clamp(max=width - 2)))
            right.masked_fill_(cols == width - 1, 1.0)
        else:
            right = widen(_gather_features(self.right, cols))
        return (left * right).sum(1)

    def dense(self) -> Float[Tensor, "batch rows cols"]:
        """Return `C_i` itself."""
        return _sum_of_products(widen(self.left), widen(self._padded_right()))

    def fold(self, samples: int) -> OuterCapture:
        """Return the capture of a batch in which each sample had several consecutive places."""
        left, right = _fold_places(self.left, samples), _fold_places(self.right, samples)
        return OuterCapture(left, right, self.ones)

    def moments(self) -> tuple[Float[Tensor, "rows rows"], Float[Tensor, "cols cols"]]:
        """Return the second moments of both factors, summed over samples and positions."""
        left = widen(self.left.flatten(0, 1))
        right = widen(self._padded_right().flatten(0, 1))
        return left.T @ left, right.T @ right

    def energy(self) -> Float[Tensor, "rows cols"]:
        """Return `sum_i C_i^2`, entry by entry."""
        left, right = widen(self.left), widen(self._padded_right())
        if left.shape[1] == 1:
            return left[:, 0].square().T @ right[:, 0].square()
        # With several positions a square is not a product of squares, so whole matrices are needed.
        parts = max(1, CHUNK_ENTRIES // (left.shape[-1] * right.shape[-1]))
        pairs = zip(left.split(parts), right.split(parts), strict=True)
        return torch.stack([_sum_of_products(a, b).square().sum(0) for a, b in pairs]).sum(0)

    def _padded_right(self) -> Float[Tensor, "batch positions cols"]:
        return torch.nn.functional.pad(self.right, (0, 1), value=1.0) if self.ones else self.right


@dataclass(frozen=True)
class LookupCapture:
    """`C_i = sum_s onehot(ids_s) right_s^T`, the contribution to an embedding table."""

    ids: Int[Tensor, "batch positions"]
    right: Float[Tensor, "batch positions cols"]
    rows: int
    first: ClassVar[int] = 0  # the number of its first sample

    @property
    def batch(self) -> int:
        """Number of samples."""
        return len(self.ids)

    def project(
        self, p_out: Float[Tensor, "rows k"], p_in: Float[Tensor, "cols l"]
    ) -> Float[Tensor, "batch k l"]:
        """Return `p_out^T C_i p_in`."""
        return _sum_of_products(p_out[self.ids], self.right.to(p_in.dtype) @ p_in)

    def entries(self, rows: Int[Tensor, " k"], cols: Int[Tensor, " k"]) -> Float[Tensor, "batch k"]:
        """Return `C_i[rows, cols]`."""
        # The comparison below has an entry per position and asked entry; with many asked entries
        # the whole matrix costs less.
        if len(rows) * 4 > self.rows:
            return self.dense()[:, rows, cols]
        right = widen(_gather_features(self.right, cols))
        return (right * (self.ids[..., None] == rows)).sum(1)

    def dense(self) -> Float[Tensor, "batch rows cols"]:
        """Return `C_i` itself."""
        right = widen(self.right)
        whole = right.new_zeros(self.batch, self.rows, right.shape[-1])
        return whole.scatter_add_(1, self.ids[..., None].expand_as(right), right)

    def fold(self, samples: int) -> LookupCapture:
        """Return the capture of a batch in which each sample had several consecutive places."""
        ids, right = _fold_places(self.ids, samples), _fold_places(self.right, samples)
        return LookupCapture(ids, right, self.rows)

    def moments(self) -> tuple[Float[Tensor, "rows rows"], Float[Tensor, "cols cols"]]:
        """Return the second moments of the left and right factors.

        Each one-hot vector is weighted by its right factor's energy.
        """
        right = widen(self.right.flatten(0, 1))
        left = right.new_zeros(self.rows).index_add_(0, self.ids.flatten(), right.square().sum(1))
        return left.diag(), right.T @ right

    def energy(self) -> Float[Tensor, "rows cols"]:
        """Return `sum_i C_i^2`, entry by entry."""
        every = widen(self.right)
        total = every.new_zeros(self.rows, every.shape[-1])
        for ids, right in zip(self.ids, every, strict=True):
            # Equal ids add up before they are squared.
            distinct, place = ids.unique(return_inverse=True)
            sums = right.new_zeros(len(distinct), right.shape[1]).index_add_(0, place, right)
            total[distinct] += sums.square()
        return total


@dataclass(frozen=True)
class DenseCapture:
    """`C_i` itself, for layers whose matrix is small or has no factors.

    Attributes:
        values: of the samples from number `first` on.
    """

    values: Float[Tensor, "batch rows cols"]
    first: int = 0

    @property
    def batch(self) -> int:
        """Number of samples."""
        return len(self.values)

    def project(
        self, p_out: Float[Tensor, "rows k"], p_in: Float[Tensor, "cols l"]
    ) -> Float[Tensor, "batch k l"]:
        """Return `p_out^T C_i p_in`."""
        return p_out.T @ self.values.to(p_out.dtype) @ p_in

    def entries(self, rows: Int[Tensor, " k"], cols: Int[Tensor, " k"]) -> Float[Tensor, "batch k"]:
        """Return `C_i[rows, cols]`."""
        return self.values[:, rows, cols]

    def dense(self) -> Float[Tensor, "batch rows cols"]:
        """Return `C_i` itself."""
        return self.values

    def fold(self, samples: int) -> DenseCapture:
        """Return the capture of a batch in which each sample had several consecutive places."""
        return DenseCapture(self.values.unflatten(0, (samples, -1)).sum(1))

    def moments(self) -> tuple[Float[Tensor, "rows rows"], Float[Tensor, "cols cols"]]:
        """Return `sum_i C_i C_i^T` and `sum_i C_i^T C_i`."""
        v = self.values
        return torch.einsum("brc,bsc->rs", v, v), torch.einsum("brc,brd->cd", v, v)

    def energy(self) -> Float[Tensor, "rows cols"]:
        """Return `sum_i C_i^2`, entry by entry."""
        return self.values.square().sum(0)


Capture = OuterCapture | LookupCapture | DenseCapture


def _fold_places(
    tensor: Shaped[Tensor, "batch positions *features"], samples: int
) -> Shaped[Tensor, "samples places *features"]:
    return tensor.reshape(samples, -1, *tensor.shape[2:])


def _gather_features(
    tensor: Float[Tensor, "batch positions features"], places: Int[Tensor, " k"]
) -> Float[Tensor, "batch positions k"]:
    """Return `tensor[..., places]`, as a new tensor."""
    # With two dimensions this is about four times as fast as that indexing.
    gathered = tensor.flatten(0, 1).index_select(1, places)
    return gathered.view(*tensor.shape[:2], len(places))


def _sum_of_products(
    left: Float[Tensor, "batch positions k"], right: Float[Tensor, "batch positions l"]
) -> Float[Tensor, "batch k l"]:
    if left.shape[1] == 1:
        return left[:, 0, :, None] * right[:, 0, None, :]
    return left.transpose(1, 2) @ right

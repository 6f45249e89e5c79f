"""The Kronecker basis, which multiplies both sides of a block by a factor."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from secateur.influence.basis import Basis
from secateur.influence.bindings import Binding
from secateur.influence.blocks import Block
from secateur.influence.captures import Capture


class KroneckerBasis(Basis):
    """`P_out^T C P_in` with orthonormal columns.

    For optimizers that treat all coefficients of a block alike (SGD).
    """

    elementwise = False

    def __init__(self, blocks: Sequence[Block], factors: Sequence[tuple[Tensor, Tensor]]) -> None:
        super().__init__(blocks, [out.shape[1] * inner.shape[1] for out, inner in factors])
        self.factors = list(factors)
        self._layer_factors: dict[Binding, Tensor] = {}

    def project_capture(self, binding: Binding, capture: Capture) -> Float[Tensor, "batch b"]:
        out, inner = self.factors[binding.block_index]
        # Gathering the factor's rows for a layer costs time, and it is the same at every step.
        view = self._layer_factors.get(binding)
        if view is None:
            view = _rows_or_zero(inner, binding.columns)
            self._layer_factors[binding] = view
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


def _rows_or_zero(matrix: Float[Tensor, "n k"], rows: Int[Tensor, " m"]) -> Float[Tensor, "m k"]:
    """Return rows of `matrix`, zero for each index that is -1."""
    rows = rows.to(matrix.device)
    return matrix[rows.clamp(min=0)] * (rows >= 0).to(matrix.dtype)[:, None]

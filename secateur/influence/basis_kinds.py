"""The kinds of bases by name, to store a basis and to restore it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from secateur.influence.basis import Basis
from secateur.influence.blocks import Block
from secateur.influence.coordinate_basis import CoordinateBasis
from secateur.influence.kronecker_basis import KroneckerBasis


def restore_basis(kind: str, blocks: Sequence[Block], tensors: Mapping[str, Tensor]) -> Basis:
    """Return the basis that `kind` (`kronecker` or `coordinates`) and its `tensors()` describe."""
    indices = range(len(blocks))
    if kind == "kronecker":
        return KroneckerBasis(blocks, [(tensors[f"{i}.out"], tensors[f"{i}.in"]) for i in indices])
    return CoordinateBasis(blocks, [tensors[f"{i}.entries"] for i in indices])


def basis_kind(basis: Basis) -> str:
    """Return the kind of a basis, as `restore_basis` takes it."""
    return "coordinates" if basis.elementwise else "kronecker"

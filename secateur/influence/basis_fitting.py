"""Bases fitted to the contributions of the first steps of a run."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from secateur.influence.bindings import Binding, Bindings
from secateur.influence.captures import Capture, LookupCapture, OuterCapture, widen
from secateur.influence.coordinate_basis import CoordinateBasis
from secateur.influence.kronecker_basis import KroneckerBasis
from secateur.influence.moments import LARGEST_SIDE, Moment, SketchedMoment

# Entries that are sorted at a time: 12 MiB of float32 values and their places.
SORTED_ENTRIES = 1 << 20


class MomentFit:
    """Sums of second moments of output gradients and activations.

    Their leading eigenvectors are a PCA basis. No square matrix has a side above `LARGEST_SIDE`:
    of longer sides (embedding tables) a sketch is kept.

    Args:
        bindings: the captured layers.
        rank: at most this many columns per side of a block.
    """

    def __init__(self, bindings: Bindings, rank: int) -> None:
        self._blocks = bindings.blocks
        self._rank = rank
        self._places = _TrainedPlaces(bindings)
        like = _like(bindings)
        self._left = [_moment(b.rows, like, rank, 2 * i) for i, b in enumerate(self._blocks)]
        self._right = [_moment(b.cols, like, rank, 2 * i + 1) for i, b in enumerate(self._blocks)]

    @property
    def nbytes(self) -> int:
        """Bytes of the sums."""
        return sum(moment.nbytes for moment in (*self._left, *self._right))

    def add(self, binding: Binding, capture: Capture) -> None:
        """Add the contributions of one call of a layer."""
        left = self._left[binding.block_index]
        right = self._right[binding.block_index]
        places = self._places.of(binding)
        if places is None:
            right.add(widen(_vectors(capture)), None)
        else:
            trained, columns = places
            right.add(widen(_vectors(capture)[:, trained]), columns)
        if isinstance(capture, LookupCapture):
            # Each one-hot vector is weighted by its right factor's energy.
            energy = widen(capture.right.flatten(0, 1)).square().sum(1)
            counts = energy.new_zeros(capture.rows)
            left.add_diagonal(counts.index_add_(0, capture.ids.flatten(), energy))
        elif isinstance(capture, OuterCapture):
            left.add(widen(capture.left.flatten(0, 1)), None)
        else:
            left.add(capture.dense().transpose(1, 2).flatten(0, 1), None)

    def basis(self, dtype: torch.dtype) -> KroneckerBasis:
        """Return the basis."""
        factors = [
            (
                left.leading_eigenvectors(self._rank).to(dtype),
                right.leading_eigenvectors(self._rank).to(dtype),
            )
            for left, right in zip(self._left, self._right, strict=True)
        ]
        return KroneckerBasis(self._blocks, factors)


class EnergyFit:
    """A sum of squared contributions, entry by entry.

    The entries of the largest sums are a coordinate basis. Energy decides over all blocks: on a
    language model such coordinates keep twice as much of a question's gradient as equally many of
    each block (benchmarks/questions.py), and on small networks as much.
    """

    def __init__(self, bindings: Bindings) -> None:
        self._blocks = bindings.blocks
        self._places = _TrainedPlaces(bindings)
        like = _like(bindings)
        self._energy = [like.new_zeros(b.rows, b.cols) for b in bindings.blocks]

    @property
    def nbytes(self) -> int:
        """Bytes of the sums."""
        return sum(energy.nbytes for energy in self._energy)

    def add(self, binding: Binding, capture: Capture) -> None:
        """Add the contributions of one call of a layer."""
        total = self._energy[binding.block_index]
        places = self._places.of(binding)
        if places is None:
            total += capture.energy()
        else:
            trained, columns = places
            total[:, columns] += capture.energy()[:, trained].to(total.dtype)

    def basis(self, coefficients: int | None) -> CoordinateBasis:
        """Return the basis of the entries of most energy, at least one of each block.

        Args:
            coefficients: entries over all blocks; all if None.
        """
        energies = [energy.flatten() for energy in self._energy]
        if coefficients is None:
            return CoordinateBasis(self._blocks, [torch.arange(len(e)) for e in energies])
        best = [largest_entries(e, min(coefficients, len(e))) for e in energies]
        values = [energy[places] for energy, places in zip(energies, best, strict=True)]
        for of_block in values:
            of_block[of_block.argmax()] = torch.inf
        chosen = torch.zeros(sum(map(len, values)), dtype=torch.bool, device=values[0].device)
        chosen[largest_entries(torch.cat(values), max(coefficients, len(values)))] = True
        own = chosen.split([len(of_block) for of_block in values])
        entries = [places[mask].sort().values.cpu() for places, mask in zip(best, own, strict=True)]
        return CoordinateBasis(self._blocks, entries)


def largest_entries(values: Float[Tensor, " n"], count: int) -> Int[Tensor, " count"]:
    """Return the places of the `count` largest values. Of equal ones the first are taken.

    Only `SORTED_ENTRIES` and `count` values are sorted at a time.
    """
    if count >= len(values):
        return torch.arange(len(values), device=values.device)
    best = torch.empty(0, dtype=torch.int64, device=values.device)
    for start, part in enumerate(values.split(SORTED_ENTRIES)):
        places = torch.arange(len(part), device=values.device)
        if len(best) == count:
            # An equal value comes after all of these, and so loses to them.
            places = (part > values[best].min()).nonzero().flatten()
        places = torch.cat([best, start * SORTED_ENTRIES + places])
        order = values[places].argsort(descending=True, stable=True)[:count]
        # In ascending order, so that the first of equal values come first again.
        best = places[order].sort().values
    return best


def _like(bindings: Bindings) -> Tensor:
    """A tensor of the sums' device and dtype: float32, or the parameters' if that is more."""
    parameter = next(iter(bindings.parameters().values())).detach()
    dtype = torch.promote_types(parameter.dtype, torch.float32)
    return parameter.new_empty(0, dtype=dtype)


def _moment(side: int, like: Tensor, rank: int, seed: int) -> Moment | SketchedMoment:
    if side <= LARGEST_SIDE:
        return Moment(side, like.dtype, like.device)
    return SketchedMoment(side, like.dtype, like.device, rank, seed)


class _TrainedPlaces:
    """For each binding its captures' trained columns, and their columns in the block."""

    def __init__(self, bindings: Bindings) -> None:
        self._blocks = bindings.blocks
        self._device = next(iter(bindings.parameters().values())).device
        # Those of sites that a trace finds later are added as they come.
        self._known = {b: self._find(b) for site in bindings.sites for b in site.bindings}

    def of(self, binding: Binding) -> tuple[Tensor, Tensor] | None:
        """Return them, or None for all columns in the same order."""
        if binding not in self._known:
            self._known[binding] = self._find(binding)
        return self._known[binding]

    def _find(self, binding: Binding) -> tuple[Tensor, Tensor] | None:
        cols = self._blocks[binding.block_index].cols
        trained = (binding.columns >= 0).nonzero().flatten()
        columns = binding.columns[trained]
        whole = len(trained) == len(binding.columns) == cols
        if whole and torch.equal(columns, torch.arange(cols)):
            return None
        return trained.to(self._device), columns.to(self._device)


def _vectors(capture: Capture) -> Float[Tensor, "n cols"]:
    """The right factors of a capture, or the rows of a matrix without factors."""
    if isinstance(capture, OuterCapture):
        right = capture.right.flatten(0, 1)
        return functional.pad(right, (0, 1), value=1.0) if capture.ones else right
    if isinstance(capture, LookupCapture):
        return capture.right.flatten(0, 1)
    return capture.dense().flatten(0, 1)

"""The coordinate basis, which keeps chosen entries of each block."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from secateur.influence.basis import Basis
from secateur.influence.bindings import Binding
from secateur.influence.blocks import Block
from secateur.influence.captures import Capture, widen


class CoordinateBasis(Basis):
    """Chosen entries of each block. For any optimizer that works element by element."""

    elementwise = True

    def __init__(self, blocks: Sequence[Block], entries: Sequence[Int[Tensor, " _"]]) -> None:
        super().__init__(blocks, [len(e) for e in entries])
        self.entries = list(entries)
        self._layer_entries: dict[Binding, tuple[Tensor, Tensor, Tensor]] = {}
        self._piece_entries: dict[tuple[int, ...], tuple[list[tuple[Tensor, Tensor]], Tensor]] = {}

    def find_entries(self, binding: Binding) -> None:
        """Find which entries are among a layer's captures. It is done once per layer."""
        if binding not in self._layer_entries:
            self._layer_entries[binding] = self._entries_of_layer(binding)

    def project_capture(self, binding: Binding, capture: Capture) -> Float[Tensor, "batch b"]:
        self.find_entries(binding)
        rows, cols, places = self._layer_entries[binding]
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
        places, order = self.find_piece_entries(block, [part.shape[1] for part in parts])
        # The pieces are not joined first, because that would copy every weight at every step.
        values = [part[own] for part, own in zip(parts, places, strict=True)]
        return widen(values[0] if len(values) == 1 else torch.cat(values)[order])

    def find_piece_entries(
        self, block: int, widths: Sequence[int]
    ) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
        """Return what `_entries_of_pieces` does, which is found once."""
        key = (block, *widths)
        if key not in self._piece_entries:
            self._piece_entries[key] = self._entries_of_pieces(block, widths)
        return self._piece_entries[key]

    def _entries_of_pieces(
        self, block: int, widths: Sequence[int]
    ) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
        """Return rows and columns of the basis' entries in each piece of a block, and their order.

        Args:
            block: the block's index.
            widths: columns of each piece.
        """
        entries = self.entries[block]
        rows = entries // self.blocks[block].cols
        cols = entries % self.blocks[block].cols
        places = []
        found = []
        start = 0
        for width in widths:
            own = ((cols >= start) & (cols < start + width)).nonzero().flatten()
            places.append((rows[own], cols[own] - start))
            found.append(own)
            start += width
        return places, torch.cat(found).argsort()

    def lift_block(
        self, block: int, coefficients: Float[Tensor, " b"]
    ) -> Float[Tensor, "rows cols"]:
        matrix = coefficients.new_zeros(self.blocks[block].rows, self.blocks[block].cols)
        matrix.view(-1)[self.entries[block]] = coefficients
        return matrix

    def tensors(self) -> dict[str, Tensor]:
        return {f"{i}.entries": e for i, e in enumerate(self.entries)}


def share_coefficients(sizes: Sequence[int], coefficients: int | None) -> list[int]:
    """Return how many coefficients each block gets if nothing is known of the blocks.

    Each gets as many as any other, or all that it has.

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

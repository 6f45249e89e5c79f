"""Documents that share the rows of a batch. Each is a sample."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from secateur.errors import SecateurError


@dataclass(frozen=True)
class Documents:
    """Where the documents of a batch stand in its rows.

    Attributes:
        rows: number of rows.
        length: positions of a row.
        places: of each document's positions, among all positions row after row; 0 after its end.
        real: whether a position belongs to the document.
    """

    rows: int
    length: int
    places: Int[Tensor, "documents longest"]
    real: Bool[Tensor, "documents longest"]

    @staticmethod
    def from_numbers(numbers: Int[Tensor, "rows positions"], samples: int) -> Documents:
        """Return the documents of a batch.

        Args:
            numbers: the number of the document that each position belongs to; -1 for padding.
            samples: the number of documents.

        Raises:
            SecateurError: a document has no position, or a number is too large.
        """
        flat = numbers.flatten()
        lengths = torch.bincount(flat[flat >= 0], minlength=samples)
        if len(lengths) != samples or not bool((lengths > 0).all()):
            raise SecateurError(
                f"the rows hold documents 0 to {int(flat.max())} and {samples} samples were "
                f"announced; number each position's document from 0, and announce every document"
            )
        order = flat.argsort(stable=True)[int((flat < 0).sum()) :]
        real = torch.arange(int(lengths.max()), device=flat.device) < lengths[:, None]
        places = torch.zeros_like(real, dtype=torch.int64)
        places[real] = order
        return Documents(numbers.shape[0], numbers.shape[1], places, real)

    def gather(self, tensor: Tensor, name: str) -> Tensor:
        """Return `documents longest ...` of a tensor `rows positions ...` or `rows*positions ...`.

        What stands after a document's end is of no document's.

        Raises:
            SecateurError: the tensor has another shape.
        """
        return self._flatten(tensor, name)[self.places]

    def gather_gradient(self, tensor: Tensor, name: str) -> Tensor:
        """Return the same of a gradient, with zeros after a document's end."""
        gathered = self.gather(tensor, name)
        return gathered * self.real.view(*self.real.shape, *[1] * (gathered.dim() - 2))

    def _flatten(self, tensor: Tensor, name: str) -> Tensor:
        if tensor.shape[:2] == (self.rows, self.length):
            return tensor.flatten(0, 1)
        if tensor.shape[:1] == (self.rows * self.length,):
            return tensor
        raise SecateurError(
            f"module {name} sees a tensor of shape {tuple(tensor.shape)} where the batch has "
            f"{self.rows} rows of {self.length} positions, so the documents in it cannot be told "
            f"apart; train on one document per row"
        )

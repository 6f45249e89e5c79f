"""Documents as the rows of a batch: one per row with padding, or several per row."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from secateur.text.documents import PADDING_ID, Document

IGNORE_INDEX = -100  # the label of positions that the loss leaves out


def pad_documents(documents: Sequence[Document], width: int | None) -> dict[str, Tensor]:
    """Return a batch with one document per row.

    Args:
        documents: the documents.
        width: positions per row; those of the longest document if None.

    Returns:
        `input_ids`, `attention_mask` and `labels`, each (documents, positions). A label is the
        token at its own position, or `IGNORE_INDEX`.
    """
    batch = _fill_rows(documents, [[number] for number in range(len(documents))], width)
    return {
        "input_ids": batch["input_ids"],
        "attention_mask": (batch["documents"] >= 0).long(),
        "labels": batch["labels"],
    }


def pack_documents(
    documents: Sequence[Document], length: int, width: int | None
) -> dict[str, Tensor]:
    """Return a batch with several documents per row, each whole.

    Args:
        documents: the documents, of at most `length` tokens.
        length: positions that a row has room for.
        width: positions per row; those of the fullest row if None.

    Returns:
        `input_ids` and `labels` as in `pad_documents`; `position_ids`, which begin at 0 with each
        document and with the padding; and `documents`, the document of each position, or -1 for
        padding. Each is (rows, positions).
    """
    sizes = [len(document.tokens) for document in documents]
    return _fill_rows(documents, _assign_rows(sizes, length), width)


def _assign_rows(sizes: Sequence[int], length: int) -> list[list[int]]:
    """Put each document, in order, into the first row that has room for it."""
    rows: list[list[int]] = []
    room: list[int] = []
    for number, size in enumerate(sizes):
        row = next((row for row, left in enumerate(room) if left >= size), len(rows))
        if row == len(rows):
            rows.append([])
            room.append(length)
        rows[row].append(number)
        room[row] -= size
    return rows


def _fill_rows(
    documents: Sequence[Document], rows: Sequence[Sequence[int]], width: int | None
) -> dict[str, Int[Tensor, "rows positions"]]:
    used = [sum(len(documents[number].tokens) for number in row) for row in rows]
    shape = (len(rows), width or max(used))
    batch = {
        "input_ids": torch.full(shape, PADDING_ID),
        "labels": torch.full(shape, IGNORE_INDEX),
        "position_ids": torch.zeros(shape, dtype=torch.long),
        "documents": torch.full(shape, -1),
    }
    for row, numbers in enumerate(rows):
        start = 0
        for number in numbers:
            tokens, counted = documents[number]
            place = (row, slice(start, start + len(tokens)))
            batch["input_ids"][place] = tokens
            batch["labels"][place] = tokens.where(counted, IGNORE_INDEX)
            batch["labels"][row, start] = IGNORE_INDEX  # nothing comes before it
            batch["position_ids"][place] = torch.arange(len(tokens))
            batch["documents"][place] = number
            start += len(tokens)
        batch["position_ids"][row, start:] = torch.arange(shape[1] - start)
    return batch

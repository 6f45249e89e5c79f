"""A data collator that keeps the samples' keys, also where several samples share a row."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from secateur.errors import PlanError

KEY = "__key__"
LABELS = "__labels__"  # a second copy, because the Trainer takes `labels` out to smooth them
DOCUMENTS = "__documents__"  # the sample that each position belongs to, or -1
ADDED = (KEY, LABELS, DOCUMENTS)
LENGTHS = "seq_lengths"  # TRL's name for the lengths of the documents in a packed row


class KeepKeys:
    """A data collator that keeps the samples' keys.

    It takes `__key__`, the sample's key in its shard, out of every example. Another collator makes
    the batch of the rest, and the list of keys is added to the batch.

    Attributes:
        columns: names of the columns that the other collator gets; all if None.

    Args:
        collator: the other collator.
        documents: if TRL packs them into rows, which drops their keys: the tokenized samples, each
            with `__key__` and `input_ids`. They are found again by their tokens.
        length: of a row, to which TRL cuts longer documents.
    """

    def __init__(
        self,
        collator: Callable[[list[Any]], Any],
        documents: Iterable[Mapping[str, Any]] = (),
        length: int | None = None,
    ) -> None:
        self.collator = collator
        self.columns: set[str] | None = None
        self._keys: dict[tuple[int, ...], deque[str]] = {}
        for document in documents:
            tokens = tuple(document["input_ids"][:length])
            self._keys.setdefault(tokens, deque()).append(document[KEY])

    def __call__(self, examples: Sequence[dict[str, Any]]) -> Any:
        """Return the batch of some examples, with their keys under `__key__`."""
        batch = self.collator([self._without_key(example) for example in examples])
        keys = [key for example in examples for key in self._keys_of(example)]
        batch[KEY] = keys
        if "labels" in batch:
            batch[LABELS] = batch["labels"]
        if "position_ids" in batch and "attention_mask" not in batch:
            batch[DOCUMENTS] = _number_documents(batch["position_ids"], len(keys))
        return batch

    def _without_key(self, example: dict[str, Any]) -> dict[str, Any]:
        return {
            name: value
            for name, value in example.items()
            if name != KEY and (self.columns is None or name in self.columns)
        }

    def _keys_of(self, example: dict[str, Any]) -> list[str]:
        if LENGTHS not in example:
            return [example[KEY]]
        keys = []
        start = 0
        for length in example[LENGTHS]:
            tokens = tuple(example["input_ids"][start : start + length])
            start += length
            found = self._keys.get(tokens)
            if found is None:
                raise PlanError(
                    f"a packed row holds a document of {length} tokens that is none of the "
                    f"{len(self._keys)} given to KeepKeys; give it `documents` tokenized as in "
                    f"training, with `length` the rows' length, and pack by the strategy `bfd`, "
                    f"which splits none"
                )
            # Equal documents contribute equally, so each takes its turn.
            found.rotate(-1)
            keys.append(found[-1])
        return keys


def _number_documents(positions: Tensor, count: int) -> Tensor:
    """Return the document of each position, or -1 after the last one. A document starts at 0."""
    starts = (positions == 0).flatten().cumsum(0).view_as(positions) - 1
    return torch.where(starts < count, starts, -1)

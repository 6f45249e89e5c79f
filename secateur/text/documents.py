"""Samples as documents: token ids, and which of them the loss counts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from secateur.errors import PlanError
from secateur.text.fields import Field
from secateur.text.tokenizer import Tokenizer

PADDING_ID = 0  # any id does: no mask and no label counts padding


class Document(NamedTuple):
    """One sample, with at least one token.

    Attributes:
        tokens: ids of its tokens.
        counted: whether the loss counts the prediction of each token.
    """

    tokens: Int[Tensor, " tokens"]
    counted: Bool[Tensor, " tokens"]


# Returns the token ids of a field of a sample. The flag says whether they begin the document.
ReadTokens = Callable[[Field, dict[str, Any], bool], Tensor]


@dataclass(frozen=True)
class DocumentReader:
    """Reads samples as documents.

    Attributes:
        read_tokens: reads a field.
        end: id of the token that is added to the end of a document, or None.
        length: tokens that a document is cut to, at its end.
        body: where the document is, or the completion if there is a prompt.
        prompt: where the prompt is. The loss does not count its tokens.
        mask: where the loss mask of the body is: 1 for each token that is counted, or 0.
    """

    read_tokens: ReadTokens
    end: int | None
    length: int
    body: Field
    prompt: Field | None
    mask: Field | None

    def read(self, sample: dict[str, Any]) -> Document:
        """Return a sample's document.

        Raises:
            PlanError: the sample lacks a field, or a field does not hold what it should.
        """
        tokens = self.read_tokens(self.body, sample, self.prompt is None)
        # Some tokenizers are configured to add the end themselves.
        if self.end is not None and tokens[-1:].tolist() != [self.end]:
            tokens = torch.cat([tokens, tokens.new_tensor([self.end])])
        counted = self._counted(sample, len(tokens))
        if self.prompt is not None:
            prompt = self.read_tokens(self.prompt, sample, True)
            tokens = torch.cat([prompt, tokens])
            counted = torch.cat([torch.zeros(len(prompt), dtype=torch.bool), counted])
        if not len(tokens):
            return Document(torch.tensor([PADDING_ID]), torch.tensor([False]))
        return Document(tokens[: self.length], counted[: self.length])

    def _counted(self, sample: dict[str, Any], tokens: int) -> Bool[Tensor, " tokens"]:
        if self.mask is None:
            return torch.ones(tokens, dtype=torch.bool)
        mask = self.mask.read_integers(sample)
        if len(mask) != tokens or not set(mask.tolist()) <= {0, 1}:
            raise PlanError(
                f"its `{self.mask.name}` must hold one 0 or 1 for each of its {tokens} tokens"
            )
        return mask.bool()


def encode_text(tokenizer: Tokenizer) -> ReadTokens:
    """Return a function that reads text and encodes it."""

    def read(field: Field, sample: dict[str, Any], begin: bool) -> Int[Tensor, " tokens"]:
        return torch.tensor(tokenizer.encode(field.read_text(sample), begin), dtype=torch.long)

    return read


def read_token_ids(field: Field, sample: dict[str, Any], begin: bool) -> Int[Tensor, " tokens"]:
    """Return token ids that a sample holds, as they are.

    Raises:
        PlanError: one is negative.
    """
    tokens = field.read_integers(sample)
    if len(tokens) and int(tokens.min()) < 0:
        raise PlanError(f"its `{field.name}` holds the negative token id {int(tokens.min())}")
    return tokens

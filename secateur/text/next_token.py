"""The learning task of language models: predict the next token."""

from __future__ import annotations

from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from secateur.errors import PlanError
from secateur.text.documents import DocumentReader, encode_text, read_token_ids
from secateur.text.fields import Field
from secateur.text.models import compute_logits
from secateur.text.rows import IGNORE_INDEX, pack_documents, pad_documents
from secateur.text.tokenizer import BYTES, load_tokenizer


class NextToken:
    """Next-token prediction. A sample's loss is the mean cross-entropy of its counted tokens.

    A plan names it `task: {factory: "secateur.text:NextToken", args: {length: 256}}`. A token is
    counted if its prediction is part of the loss. Padding, prompts, tokens that `mask` leaves out
    and a sample's first token are not counted. A sample without a counted token has loss 0, and
    contributes nothing.

    `text`, `tokens`, `prompt` and `mask` name a place in every sample: the extension of a member
    (`txt`, `tokens.npy`), or a key of a JSON member (`json.answer`).

    Args:
        length: tokens that a sample is cut to, at its end.
        text: where the text is; `txt` if `tokens` is not given either.
        tokens: where token ids are, instead of text: an `.npy` array or a JSON list. They are used
            as they are.
        prompt: where the prompt is. `text` (or `tokens`) is then its completion, and only the
            completion is counted.
        mask: where the loss mask of `tokens` is: for each token 1 if it is counted, else 0.
        tokenizer: `bytes`, the JSON file of a tokenizer (`tokenizers`), or a local folder
            (`transformers`).
        eos: the token that is added to the end of every text: its name, or true for the tokenizer's
            own (256 for bytes).
        pad: rows are as long as the longest sample of their batch (`longest`), or as `length`.
        pack: put several samples into a row, if there is room. Attention and loss stay within each.

    Raises:
        PlanError: a setting is wrong, or the tokenizer cannot be read.
    """

    def __init__(
        self,
        length: int,
        text: str | None = None,
        tokens: str | None = None,
        prompt: str | None = None,
        mask: str | None = None,
        tokenizer: str = BYTES,
        eos: bool | str = False,
        pad: Literal["longest", "length"] = "longest",
        pack: bool = False,
    ) -> None:
        if length < 2:
            raise PlanError(f"`length: {length}` leaves no token to predict; give at least 2")
        if pad not in ("longest", "length"):
            raise PlanError(f"`pad: {pad}` is not known; give longest or length")
        _check_places(text, tokens, prompt, mask)
        if tokens is None:
            loaded, end = load_tokenizer(tokenizer, eos)
            read = encode_text(loaded)
            self._vocabulary = loaded.size
        elif tokenizer == BYTES and eos is False:
            read, end = read_token_ids, None
            self._vocabulary = 0  # not known
        else:
            raise PlanError("`tokens` are used as they are; remove `tokenizer` and `eos`")
        self._reader = DocumentReader(
            read,
            end,
            length,
            body=Field.parse(tokens or text or "txt"),
            prompt=Field.parse(prompt) if prompt else None,
            mask=Field.parse(mask) if mask else None,
        )
        self._width = length if pad == "length" else None
        self._pack = pack

    def collate(self, samples: list[dict[str, Any]]) -> dict[str, Tensor]:
        """Return a batch: see `pad_documents`, or `pack_documents` with `pack: true`."""
        documents = [self._reader.read(sample) for sample in samples]
        if self._pack:
            return pack_documents(documents, self._reader.length, self._width)
        return pad_documents(documents, self._width)

    def losses(self, model: nn.Module, batch: dict[str, Tensor]) -> Float[Tensor, " samples"]:
        """Return the mean cross-entropy of each sample's counted tokens, in nats per token."""
        return _sample_losses(self._logits(model, batch), batch)

    def sizes(self, batch: dict[str, Tensor]) -> Int[Tensor, " samples"]:
        """Return each sample's number of counted tokens, which `reduction: token_mean` uses."""
        return _sum_per_sample((_next_labels(batch) != IGNORE_INDEX).long(), batch)

    def sampled(self, model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the batch with labels drawn from the model, for `curvature: {kind: fisher}`.

        The inputs stay the same, and the same tokens are counted.
        """
        drawn = torch.distributions.Categorical(logits=self._logits(model, batch).float()).sample()
        labels = batch["labels"].clone()
        labels[:, 1:] = drawn[:, :-1].where(labels[:, 1:] != IGNORE_INDEX, IGNORE_INDEX)
        return batch | {"labels": labels}

    def signed_losses(
        self, model: nn.Module, batch: dict[str, Tensor]
    ) -> Float[Tensor, " samples"]:
        """Return the losses with a random sign at every token, for the empirical Fisher.

        The signs make the gradients of a sample's tokens independent, so that the outer product of
        their mean estimates the mean of their outer products, divided by their number.
        """
        labels = _next_labels(batch)
        signs = torch.randint(2, labels.shape, device=labels.device).mul_(2).sub_(1)
        return _sample_losses(self._logits(model, batch), batch, signs)

    def metrics(self, model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return each sample's `token_accuracy` and `perplexity`.

        The first is the share of its counted tokens that the model finds most likely. The second is
        the exponential of its loss. Reports show the mean over samples of each.
        """
        logits = self._logits(model, batch)
        right = logits.argmax(2) == _next_labels(batch)
        return {
            "token_accuracy": _mean_per_sample(right.float(), batch),
            "perplexity": _sample_losses(logits, batch).exp(),
        }

    def _logits(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        vocabulary = self._vocabulary or 1 + int(batch["input_ids"].max())
        return compute_logits(model, batch, vocabulary)


def _check_places(
    text: str | None, tokens: str | None, prompt: str | None, mask: str | None
) -> None:
    if text and tokens:
        raise PlanError("`text` and `tokens` both say where samples are; give one of them")
    if mask and not tokens:
        raise PlanError("`mask` needs `tokens`, because it has one number for each token")
    if mask and prompt:
        raise PlanError("`prompt` and `mask` both say what the loss counts; give one of them")


def _sample_losses(
    logits: Tensor, batch: dict[str, Tensor], signs: Int[Tensor, "rows positions"] | None = None
) -> Float[Tensor, " samples"]:
    # In float32 at least, and flat: with classes in the second dimension it is much slower.
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    labels = _next_labels(batch)
    losses = functional.cross_entropy(
        wide.flatten(0, 1), labels.flatten(), ignore_index=IGNORE_INDEX, reduction="none"
    )
    losses = losses.view_as(labels)
    return _mean_per_sample(losses if signs is None else losses * signs, batch)


def _next_labels(batch: dict[str, Tensor]) -> Int[Tensor, "rows positions"]:
    """The label of the token after each position. A document's last position has none."""
    # The labels are shifted, not the logits, because a slice of logits is copied.
    return functional.pad(batch["labels"][:, 1:], (0, 1), value=IGNORE_INDEX)


def _sum_per_sample(values: Tensor, batch: dict[str, Tensor]) -> Tensor:
    """The sum of each sample's values (rows, positions). Those of padding must be 0."""
    if "documents" not in batch:
        return values.sum(1)
    documents = batch["documents"].flatten()
    total = values.new_zeros(int(documents.max()) + 1)
    return total.index_add(0, documents.clamp(min=0), values.flatten())


def _mean_per_sample(values: Tensor, batch: dict[str, Tensor]) -> Tensor:
    """The mean of each sample's values over its counted tokens, or 0 if it has none."""
    counts = _sum_per_sample((_next_labels(batch) != IGNORE_INDEX).to(values), batch)
    return _sum_per_sample(values, batch) / counts.clamp(min=1)

"""The losses of a Hugging Face model's samples, from its outputs and labels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

IGNORED_LABEL = -100  # of a position that the loss leaves out


@dataclass(frozen=True)
class LossRule:
    """How a batch's loss comes from the logits and labels.

    Attributes:
        shifted: whether a position's logits are compared with the next position's label.
        smoothing: the factor of label smoothing.
    """

    shifted: bool
    smoothing: float = 0.0

    def align(self, labels: Tensor) -> Tensor:
        """Return the label that each position's logits are compared with."""
        # The labels are shifted, not the logits, because a slice of these would be copied.
        return (
            functional.pad(labels[:, 1:], (0, 1), value=IGNORED_LABEL) if self.shifted else labels
        )

    def label_losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return each label's loss, zero for ignored ones, in the shape of the labels."""
        labels = self.align(labels)
        losses = functional.cross_entropy(
            logits.flatten(0, -2).float(),
            labels.flatten(),
            ignore_index=IGNORED_LABEL,
            reduction="none",
            label_smoothing=self.smoothing,
        )
        return losses.view_as(labels)

    def counted(self, labels: Tensor) -> Tensor:
        """Return which labels count, in the same order as `label_losses`."""
        return self.align(labels) != IGNORED_LABEL


def sum_by_sample(values: Tensor, samples: int, documents: Tensor | None) -> Tensor:
    """Return the sum of each sample's values, one row per sample or by their documents."""
    if documents is None:
        return values.reshape(samples, -1).sum(1)
    total = values.new_zeros(samples + 1)
    return total.index_add(0, documents.flatten() % (samples + 1), values.flatten())[:samples]


def fits(logits: Tensor, labels: Tensor) -> list[LossRule]:
    """Return the rules that the shapes of logits and labels allow, the likelier first."""
    rules = []
    if logits.shape[:-1] == labels.shape and not labels.is_floating_point():
        if labels.dim() == 2:
            rules.append(LossRule(shifted=True))
        rules.append(LossRule(shifted=False))
    return rules


def fused_outputs(output: Any, labels: Tensor) -> Any:
    """Add what TRL's fused head computes to outputs with logits: it reads the head's weight past
    its layer, where it could be captured only by running the model again for every sample."""
    scores = output.logits[:, :-1].float().log_softmax(2)
    shifted = labels[:, 1:]
    mask = shifted != IGNORED_LABEL
    chosen = scores.gather(2, shifted.clamp(min=0)[..., None])[..., 0]
    output["log_probs"] = chosen.masked_fill(~mask, 0)
    with torch.no_grad():
        entropy = -(scores.exp() * scores).sum(2)
        output["entropy"] = entropy.masked_fill(~mask, 0)
        output["is_top1"] = (scores.argmax(2) == shifted) & mask
    output["label_mask"] = mask
    return output

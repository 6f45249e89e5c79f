"""The loss of each label of a batch, from the graph of the model's loss."""

from __future__ import annotations

import torch
from torch import Tensor

from secateur.flows.trainers.sample_losses import IGNORED_LABEL


def find_token_losses(loss: Tensor, classes: Tensor) -> Tensor | None:
    """Return the loss of each label from what the loss has kept for its backward pass.

    A cross-entropy keeps its log-probabilities. To compute them again costs a large vocabulary a
    fifth of a step.

    Args:
        loss: a cross-entropy, perhaps scaled, with its graph.
        classes: the labels, one row per sample.

    Returns:
        The losses, with one row per sample; those of ignored labels are 0. None if the loss is no
        such cross-entropy.
    """
    node = loss.grad_fn
    while node is not None and node.name() != "NllLossBackward0":
        following = [function for function, _ in node.next_functions if function is not None]
        node = following[0] if len(following) == 1 else None
    if node is None:
        return None
    log_probabilities, labels = (getattr(node, f"_saved_{name}") for name in ("self", "target"))
    if node._saved_weight is not None or not torch.equal(labels, classes.flatten()):  # type: ignore[attr-defined]
        return None
    return _pick(log_probabilities, classes)


def _pick(log_probabilities: Tensor, classes: Tensor) -> Tensor:
    labels = classes.flatten()
    picked = log_probabilities.detach().gather(1, labels.clamp(min=0)[:, None])[:, 0]
    return -picked.where(labels != IGNORED_LABEL, 0).reshape(len(classes), -1)

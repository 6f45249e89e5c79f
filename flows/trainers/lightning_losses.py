"""The losses of some samples of a Lightning batch, run outside the training loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from secateur.influence.bindings import LossesOf

LOGGING = ("log", "log_dict")


def make_losses_of(
    trainer: Trainer, module: LightningModule, batch: Any, number: int, samples: int
) -> LossesOf | None:
    """Return a function that runs `training_step` on the samples at some places of a batch.

    Returns:
        The function, or None if no tensor of the batch has a first dimension of its samples.
    """
    first = [x.shape[:1] for x in tree_leaves(batch) if isinstance(x, Tensor)]
    if (samples,) not in first:
        return None

    def losses_of(places: Tensor) -> Tensor:
        part = tree_map(lambda leaf: _take(leaf, places, samples), batch, is_leaf=_is_list)
        module.sample_losses = None  # type: ignore[assignment]
        with _muted(module), trainer.precision_plugin.train_step_context():
            step: Callable[..., Any] = module.training_step
            output = step(part, number)
        losses = module.sample_losses
        if isinstance(losses, Tensor):
            return losses
        loss: Tensor = output["loss"] if isinstance(output, dict) else output
        return loss.expand(len(places))  # a mean over the samples

    return losses_of


def _is_list(value: Any) -> bool:
    return isinstance(value, list)


def _take(leaf: Any, places: Tensor, samples: int) -> Any:
    """Return the entries of some samples; whatever is not one per sample stays whole."""
    if isinstance(leaf, Tensor) and leaf.shape[:1] == (samples,):
        return leaf[places.to(leaf.device)]
    if isinstance(leaf, list) and len(leaf) == samples:
        return [leaf[place] for place in places.tolist()]
    return leaf


@contextmanager
def _muted(module: LightningModule) -> Iterator[None]:
    """Let the module log nothing within the block."""
    for name in LOGGING:
        setattr(module, name, lambda *_args, **_kwargs: None)
    try:
        yield
    finally:
        for name in LOGGING:
            delattr(module, name)

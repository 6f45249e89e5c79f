"""Embeddings that are called once for all samples, as tables of positions are."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from secateur.influence.capture.unchanged import random_state

if TYPE_CHECKING:
    from secateur.influence.bindings import LossesOf


def repeat_argument(
    table: nn.Module,
    samples: int,
    only_batch_of_one: bool = False,
    is_resting: Callable[[], bool] = lambda: False,
) -> RemovableHandle:
    """Make an embedding look up its argument once for each sample, from now on.

    Not while `is_resting` says so: a module around it is run for single samples then.
    """

    def repeat(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if not args or is_resting():
            return None
        ids = args[0]
        if ids.dim() > 1 and len(ids) == 1:
            return ids.expand(samples, *ids.shape[1:]), *args[1:]
        if only_batch_of_one:
            return None
        return ids.expand(samples, *ids.shape), *args[1:]

    return table.register_forward_pre_hook(repeat)


def can_repeat(table: nn.Module, losses_of: LossesOf) -> bool:
    """Try whether the model gives the same losses if an embedding's argument is repeated."""
    device = next(table.parameters()).device
    random = random_state(device)
    losses: list[Tensor] = []
    for repeated in (False, True):
        if device.type == "cuda":
            torch.cuda.set_rng_state(random, device)
        else:
            torch.set_rng_state(random)
        handle = repeat_argument(table, 2) if repeated else None
        try:
            with torch.no_grad():
                losses.append(losses_of(torch.zeros(2, dtype=torch.int64)))
        except (RuntimeError, IndexError, ValueError):
            if not repeated:
                raise
            return False  # the model needs the shape that the table gave before
        finally:
            if handle is not None:
                handle.remove()
    return bool(torch.allclose(losses[0], losses[1], rtol=1e-3, atol=1e-6))

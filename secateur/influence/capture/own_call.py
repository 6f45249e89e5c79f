"""A call of a module that can be repeated in the backward pass."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from secateur.influence.capture.kept import KeptTensors
from secateur.influence.capture.unchanged import random_differs, random_state

_TENSOR = object()  # stands in the place of an argument that is a tensor


@dataclass
class OwnCall:
    """One call of a module.

    Attributes:
        kept: the arguments that are tensors.
        shapes: their shapes.
        is_random: whether the call drew random numbers.
    """

    kept: KeptTensors
    shapes: list[torch.Size]
    is_random: bool
    _leaves: list[Any]
    _spec: TreeSpec
    _device: torch.device
    _autocast: tuple[bool, torch.dtype]
    _random: Tensor

    @staticmethod
    def begin(module: nn.Module, arguments: Any) -> OwnCall:
        """Return the call of a module that begins now, with arguments `(args, kwargs)`."""
        leaves, spec = tree_flatten(arguments)
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        device = next(module.parameters()).device
        return OwnCall(
            KeptTensors(tensors),
            [tensor.shape for tensor in tensors],
            False,
            [_TENSOR if isinstance(leaf, Tensor) else leaf for leaf in leaves],
            spec,
            device,
            (torch.is_autocast_enabled(device.type), torch.get_autocast_dtype(device.type)),
            random_state(device),
        )

    def end(self) -> None:
        """Note whether the call, which ends now, drew random numbers."""
        self.is_random = random_differs(self._random, random_state(self._device))

    def arguments(self, tensors: Sequence[Tensor]) -> Any:
        """Return `(args, kwargs)` with other tensors in the places of those kept."""
        remaining = iter(tensors)
        leaves = [next(remaining) if leaf is _TENSOR else leaf for leaf in self._leaves]
        return tree_unflatten(leaves, self._spec)

    @contextmanager
    def same_settings(self) -> Iterator[None]:
        """Within the block, autocast and random numbers are those of the call."""
        enabled, dtype = self._autocast
        devices = [self._device] if self._device.type == "cuda" else []
        with (
            torch.random.fork_rng(devices=devices),
            torch.autocast(self._device.type, dtype, enabled=enabled, cache_enabled=False),
        ):
            if self._device.type == "cuda":
                torch.cuda.set_rng_state(self._random, self._device)
            else:
                torch.set_rng_state(self._random)
            yield

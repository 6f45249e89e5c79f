"""Passes that leave no trace in a model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


@contextmanager
def unchanged_buffers(module: nn.Module) -> Iterator[None]:
    """Give the module's buffers back their values after the block, as running statistics need."""
    before = [(b, b._version, b.clone()) for b in module.buffers()] if module.training else []
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, version, value in before:
                if buffer._version != version:
                    buffer.copy_(value)


@contextmanager
def unchanged_model(model: nn.Module) -> Iterator[None]:
    """Leave buffers, modes and random numbers as they are, and run the model uncompiled."""
    device = next(model.parameters()).device
    devices = [device] if device.type == "cuda" else []
    modes = {module: module.training for module in model.modules()}
    stance = torch.compiler.set_stance("force_eager")
    with torch.random.fork_rng(devices=devices), unchanged_buffers(model), stance:
        try:
            yield
        finally:
            for module, mode in modes.items():
                module.training = mode


def random_differs(before: Tensor, after: Tensor) -> bool:
    """Check whether random numbers were drawn between two of torch's random states."""
    # By their bytes, because where shapes alone are run, tensors cannot be compared.
    return bool(before.numpy().tobytes() != after.numpy().tobytes())


def random_state(device: torch.device) -> Tensor:
    """Return torch's random state for a device."""
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()

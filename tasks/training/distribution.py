"""Wrap a model for training by several processes: DDP, or FSDP2."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from secateur.influence.process_group import Ranks


def distribute_model(
    model: nn.Module, ranks: Ranks, shard: str, may_skip_parameters: bool
) -> nn.Module:
    """Return the module to call in place of a model, which several processes train.

    Args:
        shard: `none` for DDP. `fsdp` divides the model itself, layer by layer: each element of its
            outermost `ModuleList`s, and the rest.
        may_skip_parameters: whether a parameter may get no gradient in a step.
    """
    if ranks.size == 1:
        return model
    if shard == "fsdp":
        _shard_model(model, ranks)
        return model
    return DistributedDataParallel(model, find_unused_parameters=may_skip_parameters)


def delay_exchange(model: nn.Module, is_last: bool) -> AbstractContextManager[Any]:
    """Let DDP exchange gradients only after the last micro-batch of a step."""
    if is_last or not isinstance(model, DistributedDataParallel):
        return nullcontext()
    context: AbstractContextManager[Any] = model.no_sync()
    return context


def outermost_layers(module: nn.Module) -> list[nn.Module]:
    """Return the elements of a model's outermost lists of modules.

    The lists inside them, such as experts, may be called by some processes only.
    """
    layers: list[nn.Module] = []
    for child in module.children():
        layers += list(child) if isinstance(child, nn.ModuleList) else outermost_layers(child)
    return layers


def _shard_model(model: nn.Module, ranks: Ranks) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    device = next(model.parameters()).device.type
    mesh = init_device_mesh(torch.device(device).type, (ranks.size,))
    for layer in outermost_layers(model):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)

"""Parameters, gradients and optimizer state that FSDP2 divides among processes (DTensors)."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, TypeGuard

from torch import Tensor, nn

from secateur.errors import SecateurError

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def unwrap_model(model: nn.Module) -> nn.Module:
    """Return the model inside a compiled one and a `DistributedDataParallel`, or the model itself.

    FSDP2's `fully_shard` keeps the model and the names of its parameters.

    Raises:
        SecateurError: the first version of FSDP wraps a part of it.
    """
    wrapped = getattr(model, "_orig_mod", model)
    if isinstance(wrapped, nn.parallel.DistributedDataParallel):
        wrapped = getattr(wrapped.module, "_orig_mod", wrapped.module)
    if any(type(module).__name__ == "FullyShardedDataParallel" for module in wrapped.modules()):
        raise SecateurError(
            "`FullyShardedDataParallel` flattens parameters, so that samples' contributions to "
            "them cannot be told apart; use `torch.distributed.fsdp.fully_shard` (FSDP2)"
        )
    return wrapped


def is_sharded(tensor: Tensor) -> TypeGuard[DTensor]:
    """Return whether a tensor is divided among processes."""
    # Importing the module takes half a second, and no such tensor exists before it is imported.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def whole_tensor(tensor: Tensor) -> Tensor:
    """Return a tensor whole. Every process must call this if it is divided among them."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def shard_like(tensor: Tensor, like: Tensor) -> Tensor:
    """Divide a whole tensor, which every process has, as another one is divided."""
    if not is_sharded(like):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    moved = tensor.to(like.device_mesh.device_type)
    return distribute_tensor(moved, like.device_mesh, like.placements, src_data_rank=None)


def check_sharding(parameters: Mapping[str, Tensor], processes: int) -> None:
    """Check that parameters are divided as FSDP2 does it: along one dimension, or not at all.

    Raises:
        SecateurError: one is divided in another way, such as by tensor parallelism.
    """
    for name, parameter in parameters.items():
        if not is_sharded(parameter):
            continue
        divided = [p for p in parameter.placements if not p.is_replicate()]
        is_plain = len(divided) <= 1 and all(type(p).__name__ == "Shard" for p in divided)
        if not is_plain or parameter.device_mesh.size() != processes:
            raise SecateurError(
                f"parameter {name} is divided as {parameter.placements} among "
                f"{parameter.device_mesh.size()} of {processes} processes, which recording cannot "
                f"follow; use `fully_shard` over all processes, without tensor parallelism"
            )


def own_part(tensor: Tensor, is_first: bool) -> Tensor:
    """Return a tensor of the whole shape with this process's entries, and zeros elsewhere.

    The processes' parts add up to the whole tensor, so whatever is linear in it can be computed
    part by part and summed. Of a tensor that every process has, only the first's part is not zero.
    """
    if is_sharded(tensor):
        return _own_entries(tensor)
    return tensor.detach() if is_first else tensor.new_zeros(tensor.shape)


def _own_entries(tensor: DTensor) -> Tensor:
    local = tensor.to_local().detach()
    whole = local.new_zeros(tensor.shape)
    place = whole
    coordinates = tensor.device_mesh.get_coordinate() or ()
    for axis, (placement, own) in enumerate(zip(tensor.placements, coordinates, strict=True)):
        dimension = getattr(placement, "dim", None)
        if dimension is None:  # every process along this axis has the same entries
            if own:
                return whole
            continue
        # Divided like torch.chunk does.
        length = tensor.shape[dimension]
        size = -(-length // tensor.device_mesh.size(axis))
        start = min(own * size, length)
        place = place.narrow(dimension, start, min(size, length - start))
    place.copy_(local)
    return whole

"""The state of a training as checkpoints hold it: weights, buffers and optimizer slots, by name."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from secateur.influence.optimizers import find_update_rule
from secateur.influence.sharded_tensors import is_sharded, shard_like, whole_tensor
from secateur.tasks.data.collate import Tensors


def capture_state(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    numbered_like: torch.optim.Optimizer | None = None,
    keep: bool = True,
) -> Tensors:
    """Return copies of weights, buffers and optimizer state on the CPU, by name.

    Tensors that FSDP2 divides among processes are put together one by one, so every process must
    call this. The copies are the same however many processes there are.

    Args:
        numbered_like: an optimizer over the same parameters, whose order numbers them in the names;
            `optimizer` itself if None.
        keep: whether to return the copies. A process that does not write them only helps to make
            them, and returns nothing.
    """
    order = _parameters(numbered_like or optimizer)
    numbers = {id(parameter): number for number, parameter in enumerate(order)}
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    for parameter in _parameters(optimizer):
        for key, value in optimizer.state.get(parameter, {}).items():
            if value is not None:
                name = f"optimizer.{numbers[id(parameter)]}.{key}"
                tensors[name] = torch.as_tensor(value)
    copies = {}
    for name, tensor in tensors.items():
        copy = _copy_whole(tensor.detach())
        if keep:
            copies[name] = copy
        # Or it would be in memory while the next one is put together.
        del copy
    return copies


def load_state(
    tensors: Tensors,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    slots: bool = True,
    numbered_like: torch.optim.Optimizer | None = None,
) -> None:
    """Load the state that `capture_state` returned into a model and an optimizer.

    Each process takes its own part of a tensor that FSDP2 divides.

    Args:
        slots: whether to load the optimizer's state; it is reset otherwise.
        numbered_like: as in `capture_state`.
    """
    weights = {n.removeprefix("model."): t for n, t in tensors.items() if n.startswith("model.")}
    present = model.state_dict()
    model.load_state_dict(
        {name: shard_like(tensor, present.get(name, tensor)) for name, tensor in weights.items()}
    )
    if slots:
        state = _saved_state(tensors, optimizer, numbered_like or optimizer)
    else:
        state = _initial_state(optimizer)
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def _copy_whole(tensor: Tensor) -> Tensor:
    """Return a whole copy of a tensor on the CPU."""
    whole = whole_tensor(tensor)
    # Parts that are put together are a copy already.
    return whole.cpu() if is_sharded(tensor) else whole.cpu().clone()


def _saved_state(
    tensors: Tensors, optimizer: torch.optim.Optimizer, numbered_like: torch.optim.Optimizer
) -> dict[int, Tensors]:
    """The state of each of an optimizer's parameters by its number, from captured tensors."""
    numbers = {id(parameter): n for n, parameter in enumerate(_parameters(optimizer))}
    order = _parameters(numbered_like)
    places = [numbers[id(parameter)] for parameter in order]
    state: dict[int, Tensors] = {}
    for name, tensor in tensors.items():
        if name.startswith("optimizer."):
            _, number, key = name.split(".", 2)
            # load_state_dict keeps the tensors it is given, and training would change them.
            slot = _place_slot(tensor.clone(), order[int(number)])
            state.setdefault(places[int(number)], {})[key] = slot
    return state


def _initial_state(optimizer: torch.optim.Optimizer) -> dict[int, Tensors]:
    """The state before the first step. Most optimizers have none, and make it at that step."""
    rule = find_update_rule(optimizer)
    states = [
        rule.initial_state(group, parameter.detach())
        for group in optimizer.param_groups
        for parameter in group["params"]
    ]
    return {number: state for number, state in enumerate(states) if state}


def _place_slot(tensor: Tensor, parameter: Tensor) -> Tensor:
    """Divide a slot like its parameter, unless it is a number for the whole parameter."""
    return shard_like(tensor, parameter) if tensor.shape == parameter.shape else tensor


def _parameters(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]

"""Room `tasks`: the state of a training, named as checkpoints hold it: weights, buffers and the optimizer's slots."""

from __future__ import annotations

import torch
from torch import Tensor, nn

Tensors = dict[str, Tensor]


def capture_state(
    model: nn.Module, optimizer: torch.optim.Optimizer, like: torch.optim.Optimizer | None = None
) -> Tensors:
    """Weights, buffers and optimizer state, by name; copies, on the CPU.

    Args:
        like: an optimizer of the same parameters, whose order numbers them; the optimizer's own where it is None.
    """
    numbers = {id(p): number for number, p in enumerate(_parameters(like or optimizer))}
    held = {f"model.{name}": t for name, t in model.state_dict().items()}
    for parameter in _parameters(optimizer):
        for key, value in optimizer.state.get(parameter, {}).items():
            if value is not None:
                held[f"optimizer.{numbers[id(parameter)]}.{key}"] = torch.as_tensor(value)
    return {name: t.detach().cpu().clone() for name, t in held.items()}  # tied ones apart


def load_state(
    tensors: Tensors,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    slots: bool = True,
    like: torch.optim.Optimizer | None = None,
) -> None:
    """Takes up the state that `state_of` gave; without `slots` the optimizer's is reset."""
    model.load_state_dict(
        {n.removeprefix("model."): t for n, t in tensors.items() if n.startswith("model.")}
    )
    numbers = {id(p): number for number, p in enumerate(_parameters(optimizer))}
    places = [numbers[id(p)] for p in _parameters(like or optimizer)]
    state: dict[int, Tensors] = {}
    for name, tensor in tensors.items() if slots else ():
        if name.startswith("optimizer."):
            _, index, key = name.split(".", 2)
            state.setdefault(places[int(index)], {})[key] = (
                tensor.clone()
            )  # torch would train on it
    optimizer.load_state_dict(
        {"state": state, "param_groups": optimizer.state_dict()["param_groups"]}
    )


def _parameters(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"]]

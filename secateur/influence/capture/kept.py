"""Tensors that a forward pass keeps for its backward pass, as autograd keeps its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_ANCHOR = torch.empty(0, requires_grad=True)  # autograd makes a node only for what needs gradients


class _Keep(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, anchor: Tensor, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors)
        return torch.empty(0)


class KeptTensors:
    """Tensors kept for the backward pass.

    They are saved in a node of the autograd graph, not held. So activation checkpointing drops them
    and recomputes them like any other activation, and what autograd keeps too is not kept twice.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        keep: Any = _Keep.apply
        self._node = keep(_ANCHOR, *tensors).grad_fn

    def take(self, last: bool = False) -> list[Tensor]:
        """Return the tensors, detached. Within a backward pass only.

        Args:
            last: whether this backward pass needs them no more. They are then let go, as autograd
                lets go of its own, unless it retains the graph.
        """
        tensors = [tensor.detach() for tensor in self._node.saved_tensors]
        if last and not torch._C._autograd._get_current_graph_task_keep_graph():
            self._node = None
        return tensors

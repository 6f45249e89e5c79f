"""The steps of a replay's tape in temporary files, of which one is in memory at a time."""

from __future__ import annotations

from dataclasses import replace

from secateur.influence.tape import StepState
from secateur.storage.tensors import TensorStack


class StoredSteps:
    """A stack of steps whose tensors of parameter size are on disk.

    Args:
        stack: holds the tensors.
        device: the device that they come back to.
    """

    def __init__(self, stack: TensorStack, device: str) -> None:
        self._stack = stack
        self._device = device
        self._rest: list[StepState] = []

    def append(self, state: StepState) -> None:
        """Put a step on top of the stack."""
        tensors = {f"states/{group}": tensor for group, tensor in enumerate(state.states)}
        tensors |= {f"gradients/{group}": tensor for group, tensor in enumerate(state.gradients)}
        self._stack.push(tensors)
        self._rest.append(replace(state, states=[], gradients=[]))

    def pop(self) -> StepState:
        """Take the top step from the stack."""
        rest = self._rest.pop()
        tensors = self._stack.pop()
        count = len(tensors) // 2
        states = [tensors[f"states/{group}"].to(self._device) for group in range(count)]
        gradients = [tensors[f"gradients/{group}"].to(self._device) for group in range(count)]
        return replace(rest, states=states, gradients=gradients)

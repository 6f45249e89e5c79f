"""A trace of a forward pass: which module was called with which shapes, and what each call read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from secateur.influence.capture.unchanged import random_state


@dataclass
class Call:
    """One call of a module.

    Attributes:
        module: the module.
        parent: the call within which this one was made.
        inputs: the tensors among its arguments.
        outputs: the tensors that it returned.
        reads: names of the parameters that its own forward read, outside calls of submodules.
        silent_reads: the same, where autograd did not follow.
    """

    module: nn.Module
    parent: Call | None
    inputs: list[Tensor]
    outputs: list[Tensor] = field(default_factory=list)
    reads: set[str] = field(default_factory=set)
    silent_reads: set[str] = field(default_factory=set)

    def path(self) -> list[Call]:
        """Return the calls around this one, from the innermost (itself) to the outermost."""
        return [self, *(self.parent.path() if self.parent else [])]


@dataclass
class Trace:
    """The calls of a forward pass in order.

    Attributes:
        calls: the calls.
        outside: names of the parameters that were read outside all calls.
        is_random: whether random numbers were drawn.
    """

    calls: list[Call] = field(default_factory=list)
    outside: set[str] = field(default_factory=set)
    is_random: bool = False


def trace_calls(
    model: nn.Module, parameters: Mapping[str, nn.Parameter], forward: Callable[[], Any]
) -> Trace:
    """Run a forward pass and return its trace.

    Args:
        model: the model.
        parameters: the parameters whose reads are traced.
        forward: runs the model.
    """
    trace = Trace()
    stack: list[Call] = []
    names = {id(p): name for name, p in parameters.items()}

    def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
        parent = stack[-1] if stack else None
        stack.append(Call(module, parent, [x.detach() for x in tensors_of((args, kwargs))]))
        trace.calls.append(stack[-1])

    def leave(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        stack.pop().outputs = tensors_of(output)

    def read(name: str) -> None:
        if not torch.is_grad_enabled() and stack:
            stack[-1].silent_reads.add(name)
        elif stack:
            stack[-1].reads.add(name)
        else:
            trace.outside.add(name)

    device = next(model.parameters()).device
    random = random_state(device)
    with _hooks_on_all(model, enter, leave), _ReadMode(names, read), torch.enable_grad():
        forward()
    trace.is_random = not torch.equal(random, random_state(device))
    _count_silent_reads(trace)
    return trace


def _count_silent_reads(trace: Trace) -> None:
    """Take silent reads for reads, if a parameter has no others.

    The forward pass of reentrant checkpointing is one that autograd does not follow.
    """
    followed = trace.outside.union(*(call.reads for call in trace.calls))
    for call in trace.calls:
        call.reads |= call.silent_reads - followed


def tensors_of(tree: Any) -> list[Tensor]:
    """Return the tensors among nested arguments or outputs, in order."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


@contextmanager
def _hooks_on_all(model: nn.Module, enter: Callable[..., Any], leave: Any) -> Iterator[None]:
    handles = []
    for module in model.modules():
        # First of all, because another hook may read parameters too (old `weight_norm` does).
        pre = module.register_forward_pre_hook(enter, prepend=True, with_kwargs=True)
        post = module.register_forward_hook(leave, with_kwargs=True)
        handles += [pre, post]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _ReadMode(TorchFunctionMode):
    """Calls `read` with the name of each parameter that a differentiable operation reads."""

    def __init__(self, names: Mapping[int, str], read: Callable[[str], None]) -> None:
        super().__init__()
        self._names = names
        self._read = read

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        # Reading a shape, or detaching, contributes nothing to the gradient.
        results = tensors_of(output)
        if any(r.requires_grad for r in results) or (results and not torch.is_grad_enabled()):
            for leaf in tree_leaves((args, kwargs)):
                if id(leaf) in self._names:
                    self._read(self._names[id(leaf)])
        return output

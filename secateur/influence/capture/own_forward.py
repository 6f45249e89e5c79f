"""Contributions of a module of no known layer family, by differentiating its own forward.

Three ways, each for what the one before cannot do: all samples at once by `torch.func`; one sample
after the other; and, if the forward draws random numbers (dropout) or takes no single sample, the
whole batch again with the same numbers, with one backward pass per sample.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from secateur.influence.capture.call_trace import tensors_of
from secateur.influence.capture.layouts import SHARED, split_samples
from secateur.influence.capture.own_call import OwnCall
from secateur.influence.capture.unchanged import unchanged_buffers
from secateur.influence.captures import CHUNK_ENTRIES

# The number of a first sample, and the gradients `samples ...` of it and the next ones, one tensor
# per parameter.
SampleGradients = tuple[int, list[Tensor]]


@dataclass(frozen=True)
class OutputGradient:
    """The gradient of the loss with respect to one of the tensors that a call returned.

    Attributes:
        output: which of them.
        value: the gradient.
        dim: the dimension of the samples in it.
        samples: the number of samples.
    """

    output: int
    value: Tensor
    dim: int
    samples: int


@contextmanager
def _no_vmap_warning() -> Iterator[None]:
    """Say nothing where `vmap` runs an operation sample by sample."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="There is a performance drop")
        yield


class OwnForward:
    """Differentiates a module's own forward for each sample of a batch.

    Args:
        module: the module, whose forward treats samples one by one.
        name: its name, for errors.
        parameters: names of the parameters to differentiate, as in the module.
    """

    def __init__(self, module: nn.Module, name: str, parameters: Sequence[str]) -> None:
        self._module = module
        self._name = name
        named = dict(module.named_parameters(remove_duplicate=False))
        self._parameters = {parameter: named[parameter] for parameter in parameters}
        entries = sum(p.numel() for p in self._parameters.values())
        self._at_once = max(1, CHUNK_ENTRIES // entries)
        # Recurrent layers hold their weights in a second place, which `torch.func` does not reach.
        self._whole = False  # whether only the whole batch can be run
        self._by_func = not any(hasattr(m, "_flat_weights") for m in module.modules())

    @property
    def way(self) -> str:
        """How samples are told apart where no random numbers are drawn, as far as is known."""
        if self._whole:
            return "by masks"
        return "at once" if self._by_func else "one by one"

    def gradients(
        self,
        call: OwnCall,
        tensors: Sequence[Tensor],
        dims: Sequence[int],
        received: OutputGradient,
    ) -> Iterator[SampleGradients]:
        """Yield the gradients of `<gradient, output>` with respect to the parameters.

        Args:
            call: the call.
            tensors: the tensors among its arguments.
            dims: the dimension of the samples in each of these, or `SHARED`.
            received: the gradient of one of its outputs.
        """
        count = received.samples
        slices = split_samples(received.value, received.dim, count, self._name)
        if call.is_random or self._whole:
            yield from self._by_masks(call, tensors, received, slices)
            return
        inputs = [
            x if dim == SHARED else split_samples(x, dim, count, self._name)
            for x, dim in zip(tensors, dims, strict=True)
        ]
        for start in range(0, count, self._at_once):
            rows = slice(start, min(start + self._at_once, count))
            part = [x if d == SHARED else x[rows] for x, d in zip(inputs, dims, strict=True)]
            try:
                found = self._of_part(call, dims, part, received.output, slices[rows])
            except (RuntimeError, ValueError, IndexError):
                # It does not take one sample: a state that it keeps has the batch's shape.
                self._whole = True
                yield from self._by_masks(call, tensors, received, slices, start)
                return
            yield start, found

    def _of_part(
        self,
        call: OwnCall,
        dims: Sequence[int],
        inputs: list[Tensor],
        output: int,
        slices: Tensor,
    ) -> list[Tensor]:
        """Return the gradients of some samples, by `torch.func` where it can."""
        if self._by_func:
            try:
                with call.same_settings(), unchanged_buffers(self._module), _no_vmap_warning():
                    return self._all_at_once(call, dims, inputs, output, slices)
            except (RuntimeError, NotImplementedError, ValueError, TypeError):
                # An operation that vmap does not know, or a branch that depends on the data.
                self._by_func = False
        rows = []
        for i, own_slice in enumerate(slices):
            own = [x if d == SHARED else x[i] for x, d in zip(inputs, dims, strict=True)]
            rows.append(self._differentiate(self._outputs(call, own)[output], own_slice, False))
        return [torch.stack(parts) for parts in zip(*rows, strict=True)]

    def _all_at_once(
        self,
        call: OwnCall,
        dims: Sequence[int],
        inputs: list[Tensor],
        output: int,
        slices: Tensor,
    ) -> list[Tensor]:
        def weighted(parameters: dict[str, Tensor], tensors: list[Tensor], own: Tensor) -> Tensor:
            args, kwargs = call.arguments(tensors)
            result = torch.func.functional_call(self._module, parameters, args, kwargs)
            return (tensors_of(result)[output] * own).sum()

        parameters = {name: p.detach() for name, p in self._parameters.items()}
        in_dims = (None, [None if dim == SHARED else 0 for dim in dims], 0)
        per_sample = torch.func.vmap(torch.func.grad(weighted), in_dims=in_dims)
        return list(per_sample(parameters, inputs, slices).values())

    def _by_masks(
        self,
        call: OwnCall,
        tensors: Sequence[Tensor],
        received: OutputGradient,
        slices: Tensor,
        start: int = 0,
    ) -> Iterator[SampleGradients]:
        result = self._outputs(call, tensors)[received.output]
        for i in range(start, len(slices)):
            masked = torch.zeros_like(result)
            split_samples(masked, received.dim, received.samples, self._name)[i] = slices[i]
            yield i, [g[None] for g in self._differentiate(result, masked, True)]

    def _outputs(self, call: OwnCall, tensors: Sequence[Tensor]) -> list[Tensor]:
        args, kwargs = call.arguments(tensors)
        with call.same_settings(), unchanged_buffers(self._module), torch.enable_grad():
            result: Any = self._module(*args, **kwargs)
        return tensors_of(result)

    def _differentiate(self, result: Tensor, gradient: Tensor, keep: bool) -> list[Tensor]:
        parameters = list(self._parameters.values())
        return list(
            torch.autograd.grad(
                result, parameters, gradient, retain_graph=keep, materialize_grads=True
            )
        )

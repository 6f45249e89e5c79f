"""Room `secateur`: hooks that hand each bound layer's captures on, during the backward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from secateur.errors import SecateurError
from secateur.influence.basis import Basis
from secateur.influence.bindings import Binding, Bindings
from secateur.influence.captures import Capture

Sink = Callable[[Binding, Capture], None]


@contextmanager
def capture_hooks(
    bindings: Bindings,
    sink: Sink,
    watch: Callable[[Tensor], None] | None = None,
    batch: int | None = None,
) -> Iterator[list[GradientEdge]]:
    """Within the block, every backward pass through a bound layer calls `sink` with what the layer contributed, and
    before it `watch` with the gradient with respect to the layer's output, the last layer's first.

    Given is a list that fills with the place of each call's output in the graph: whoever differentiates with respect to
    these alone calls every sink, and no weight's gradient is formed on the way.

    A layer that is called several times in a forward pass gives several captures. Outside the block the model has no
    hooks, so that a step that isn't recorded costs nothing.

    Args:
        batch: number of samples. Where it is given, an embedding that is looked up once for all of them (positions, in
            many language models) is looked up for each, so that the samples can be told apart.
    """
    outputs: list[GradientEdge] = []
    listeners = [(b.module, _listener(b, sink, watch, outputs)) for b in bindings.bindings]
    handles = [
        module.register_forward_hook(listener, with_kwargs=True) for module, listener in listeners
    ]
    if batch is not None:
        tables = [b.module for b in bindings.bindings if isinstance(b.module, nn.Embedding)]
        handles += [table.register_forward_pre_hook(_spreading(batch)) for table in tables]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def _listener(
    binding: Binding,
    sink: Sink,
    watch: Callable[[Tensor], None] | None,
    outputs: list[GradientEdge],
) -> Callable[..., None]:
    def forward_hook(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
    ) -> None:
        inputs = args or tuple(kwargs.values())
        if output.requires_grad:

            def backward_hook(gradient: Tensor) -> None:
                with torch.no_grad():
                    if watch is not None:
                        watch(gradient)
                    sink(binding, binding.family.capture(module, inputs, gradient))

            output.register_hook(backward_hook)
            outputs.append(
                get_gradient_edge(output)
            )  # as it is now: an activation may overwrite it in place

    return forward_hook


def _spreading(batch: int) -> Callable[..., Any]:
    def pre_hook(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if not args or args[0].dim() < 2 or len(args[0]) != 1:
            return None
        return args[0].expand(batch, *args[0].shape[1:]), *args[1:]

    return pre_hook


class ContributionSum:
    """A sink that adds up each sample's captures in the numbers of a basis.

    Attributes:
        coefficients: `batch p`, the contributions of the batch so far.
        errors: norm of each sample's gradient with respect to the output of the layer that the backward pass met first.
    """

    def __init__(self, basis: Basis, batch: int, dtype: torch.dtype, device: torch.device) -> None:
        self._basis = basis
        self.coefficients: Float[Tensor, "batch p"] = torch.zeros(
            batch, basis.size, dtype=dtype, device=device
        )
        self.errors: Float[Tensor, " batch"] | None = None

    def __call__(self, binding: Binding, capture: Capture) -> None:
        if capture.batch != len(self.coefficients):
            raise SecateurError(
                f"layer {binding.module_name} saw a batch of {capture.batch} where {len(self.coefficients)} samples were "
                f"announced; the first dimension of every captured layer must be the sample"
            )
        span = self._basis.spans[binding.block_index]
        self.coefficients[:, span] += self._basis.project_capture(binding, capture)

    def watch(self, gradient: Tensor) -> None:
        """Keeps the first gradient's norms: over a sample's positions and features."""
        if self.errors is None:
            self.errors = gradient.to(self.coefficients.dtype).reshape(len(gradient), -1).norm(dim=1)


def sample_gradients(
    losses: Callable[[], Float[Tensor, " batch"]], batch: int, bindings: Bindings, basis: Basis
) -> tuple[Float[Tensor, "batch p"], Float[Tensor, " batch"]]:
    """Each sample's own loss gradient in the numbers of `basis`, and its loss; no parameter's `.grad` is touched.

    Args:
        losses: runs the forward pass and returns one loss a sample.
        batch: number of samples.
    """
    first = bindings.parameters()[0]
    reducer = ContributionSum(basis, batch, first.dtype, first.device)
    with capture_hooks(bindings, reducer, batch=batch) as outputs:
        values = losses()
        torch.autograd.grad(values.sum(), outputs, allow_unused=True)
    return reducer.coefficients, values.detach()

"""Hooks that capture the contributions to each bound layer during the backward pass."""

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
    """Call `sink` at every backward pass through a bound layer within the block.

    A layer that is called several times in a forward pass gives several captures. Outside the block
    the model has no hooks, so a step that is not recorded costs nothing extra.

    Args:
        bindings: the layers.
        sink: gets the layer's binding and the capture.
        watch: called before `sink` with the gradient with respect to the layer's output. The last
            layer's comes first.
        batch: number of samples. If given, an embedding that is looked up once for all of them
            (positions, in many language models) is looked up for each, so that the samples'
            contributions can be separated.

    Yields:
        A list that fills with the edge of each call's output in the autograd graph. Differentiating
        with respect to these alone calls every sink, and forms no weight's gradient.
    """
    outputs: list[GradientEdge] = []
    handles = []
    for binding in bindings.bindings:
        hook = _make_forward_hook(binding, sink, watch, outputs)
        handles.append(binding.module.register_forward_hook(hook, with_kwargs=True))
    if batch is not None:
        tables = [b.module for b in bindings.bindings if isinstance(b.module, nn.Embedding)]
        handles += [
            table.register_forward_pre_hook(_make_expanding_hook(batch)) for table in tables
        ]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def _make_forward_hook(
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
            # The edge is taken now, because an activation may overwrite the output in place.
            outputs.append(get_gradient_edge(output))

    return forward_hook


def _make_expanding_hook(batch: int) -> Callable[..., Any]:
    def pre_hook(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if not args or args[0].dim() < 2 or len(args[0]) != 1:
            return None
        return args[0].expand(batch, *args[0].shape[1:]), *args[1:]

    return pre_hook


class ContributionSum:
    """A sink that sums each sample's captures in the coefficients of a basis.

    Attributes:
        coefficients: `batch p`, the contributions of the batch so far.
        errors: norm of each sample's gradient with respect to the output of the layer that the
            backward pass reached first.
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
                f"layer {binding.module_name} saw a batch of {capture.batch} where "
                f"{len(self.coefficients)} samples were announced; the first dimension of every "
                f"captured layer must be the sample"
            )
        span = self._basis.spans[binding.block_index]
        self.coefficients[:, span] += self._basis.project_capture(binding, capture)

    def watch(self, gradient: Tensor) -> None:
        """Keep the norms of the first gradient, over a sample's positions and features."""
        if self.errors is None:
            flat = gradient.to(self.coefficients.dtype).reshape(len(gradient), -1)
            self.errors = flat.norm(dim=1)


def sample_gradients(
    losses: Callable[[], Float[Tensor, " batch"]], batch: int, bindings: Bindings, basis: Basis
) -> tuple[Float[Tensor, "batch p"], Float[Tensor, " batch"]]:
    """Return each sample's own loss gradient in the coefficients of `basis`, and its loss.

    No parameter's `.grad` is changed.

    Args:
        losses: runs the forward pass and returns one loss per sample.
        batch: number of samples.
        bindings: the captured layers.
        basis: the basis of the coefficients.
    """
    first = bindings.parameters()[0]
    total = ContributionSum(basis, batch, first.dtype, first.device)
    with capture_hooks(bindings, total, batch=batch) as outputs:
        values = losses()
        torch.autograd.grad(values.sum(), outputs, allow_unused=True)
    return total.coefficients, values.detach()

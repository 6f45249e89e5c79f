"""The generalised Gauss-Newton matrix in the coefficients of a basis, exactly.

It is the Hessian of a model that is taken as linear in its parameters: `J^T H J`, where `J` is the
derivative of the model's outputs by the parameters, and `H` the Hessian of the loss by the outputs.
It has no negative eigenvalue if the loss is convex in the outputs. For a cross-entropy, it is the
Fisher information in expectation over labels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from secateur.errors import SecateurError
from secateur.influence.basis import Basis
from secateur.influence.vector_products import Product, sum_matrices, vector_products


@dataclass
class _Outputs:
    """What a model returned while its graph was cut there.

    Attributes:
        calls: how often the model was called.
        values: the tensors, with the model's graph.
        leaves: the tensors that took their place. The loss's graph ends at them.
    """

    calls: int = 0
    values: list[Tensor] = field(default_factory=list)
    leaves: list[Tensor] = field(default_factory=list)


def compute_gauss_newton(
    losses: Sequence[Callable[[], Float[Tensor, ""]]],
    model: nn.Module,
    basis: Basis,
    spans: Sequence[slice],
) -> Float[Tensor, " entries"]:
    """Return `P^T (J^T H J) P` of each span, summed over losses, flattened and concatenated.

    No parameter's `.grad` is changed.

    Args:
        losses: each calls the model, computes a scalar from what it returns, and returns it. They
            are added up.
        model: the model.
        basis: the basis of the coefficients.
        spans: the coefficients that are coupled. Between spans the matrix is taken as zero.

    Raises:
        SecateurError: a loss depends on the parameters in another way than through what the model
            returns, or the model returns the loss itself.
    """

    def product_of(loss: Callable[[], Tensor], parameters: Mapping[str, Tensor]) -> Product:
        tensors = list(parameters.values())
        with _cut_graph(model) as outputs:
            value = loss()
        gradients = _output_gradients(value, outputs, model)
        # The derivative by `multipliers` of `J^T multipliers`, which is linear in them, is `J`.
        multipliers = [torch.zeros_like(x, requires_grad=True) for x in outputs.values]
        pulled = torch.autograd.grad(
            outputs.values, tensors, multipliers, create_graph=True, materialize_grads=True
        )
        projected = basis.project_tensors(dict(zip(parameters, pulled, strict=True)))

        def product(directions: Tensor) -> tuple[Tensor, ...]:
            changes = vector_products([projected], multipliers, [directions])
            curved = vector_products(gradients, outputs.leaves, changes)
            return vector_products(outputs.values, tensors, curved)

        return product

    return sum_matrices(losses, product_of, model, basis, spans)


@contextmanager
def _cut_graph(model: nn.Module) -> Iterator[_Outputs]:
    """Cut the graph of what the model returns from that of what is computed from it."""
    outputs = _Outputs()

    def cut(value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.requires_grad:
            return value
        leaf = value.detach().requires_grad_()
        outputs.values.append(value)
        outputs.leaves.append(leaf)
        return leaf.clone()  # a leaf could not be changed in place

    def on_return(module: nn.Module, args: object, output: Any) -> Any:
        outputs.calls += 1
        return tree_map(cut, output)

    handle = model.register_forward_hook(on_return)
    try:
        yield outputs
    finally:
        handle.remove()


def _output_gradients(loss: Tensor, outputs: _Outputs, model: nn.Module) -> list[Tensor]:
    """Return the loss's gradient by each output, and drop the outputs that it is linear in.

    Raises:
        SecateurError: the outputs are not all that the loss reads of the parameters, or its
            gradient does not change with them.
    """
    _check_calls(outputs)
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    gradients = torch.autograd.grad(
        loss, [*outputs.leaves, *named.values()], create_graph=True, allow_unused=True
    )
    count = len(outputs.leaves)
    for name, gradient in zip(named, gradients[count:], strict=True):
        if gradient is not None:
            raise SecateurError(
                f"the loss depends on parameter {name} in another way than through the tensors "
                f"that the model returns, so its Gauss-Newton matrix is not defined; choose "
                f"another curvature"
            )
    # A gradient without a graph does not change with any output, and its output changes no other.
    read = [n for n, g in enumerate(gradients[:count]) if g is not None and g.requires_grad]
    if not read:
        raise SecateurError(
            "the loss is linear in what the model returns, as if the model computed the loss "
            "itself, so its Gauss-Newton matrix is zero; let the model return its logits and the "
            "learning task compute the loss from them, or choose another curvature"
        )
    outputs.values = [outputs.values[number] for number in read]
    outputs.leaves = [outputs.leaves[number] for number in read]
    return [gradients[number] for number in read]


def _check_calls(outputs: _Outputs) -> None:
    """Check that the model was called, and that no call reads what another returned."""
    if not outputs.calls:
        raise SecateurError(
            "the loss was computed without a call of the model, as `model(...)`, so its "
            "Gauss-Newton matrix is not defined; choose another curvature"
        )
    if outputs.calls > 1 and _depend(outputs.values, outputs.leaves):
        raise SecateurError(
            "one call of the model reads what another returned, so the Gauss-Newton matrix of "
            "their outputs is not defined; choose another curvature"
        )


def _depend(values: Sequence[Tensor], leaves: Sequence[Tensor]) -> bool:
    """Whether any of some values depends on any of some leaves."""
    gradients = torch.autograd.grad(
        values,
        leaves,
        [torch.zeros_like(value) for value in values],
        retain_graph=True,
        allow_unused=True,
    )
    return any(gradient is not None for gradient in gradients)

"""Capture the contributions to a model's bound parameters during its backward pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from jaxtyping import Float, Int
from torch import Tensor

from secateur.influence.basis import Basis
from secateur.influence.bindings import Binding, Bindings, LossesOf
from secateur.influence.capture.alone_check import SampleCheck, check_reached
from secateur.influence.capture.documents import Documents
from secateur.influence.capture.gradients import gradients_by_backward, is_reentrant
from secateur.influence.capture.site_hooks import Sink, SiteHooks, Watch
from secateur.influence.captures import HALF_TYPES, Capture


@contextmanager
def capture_hooks(
    bindings: Bindings,
    sink: Sink,
    samples: int,
    watch: Watch | None = None,
    documents: Int[Tensor, "rows positions"] | None = None,
) -> Iterator[SiteHooks]:
    """Call `sink` at every backward pass through a site within the block.

    A site that is called several times in a forward pass gives several captures. Outside the block
    the model has no hooks, so a step that is not recorded costs nothing extra. Within it, a
    compiled model runs uncompiled, because a compiled one does not call its modules.

    Args:
        bindings: the captured parameters.
        sink: gets the binding and the capture.
        samples: the number of samples in the batch.
        watch: as in `SiteHooks`.
        documents: the sample that each position of the batch belongs to, or -1, if several samples
            share a row.
    """
    packed = None if documents is None else Documents.from_numbers(documents, samples)
    hooks = SiteHooks(sink, watch, samples, packed)
    # A frozen part in half precision rounds what reaches adapters in float32.
    hooks.half = any(p.dtype in HALF_TYPES for p in bindings.model.parameters())
    with ExitStack() as handles, torch.compiler.set_stance("force_eager"):
        # The graph holds the hooks and these edges hold the graph, a cycle that the garbage
        # collector does not see. Without this every step's activations would stay in memory.
        handles.callback(hooks.outputs.clear)
        for site in bindings.sites:
            hooks.install(site, handles)
        yield hooks


class ContributionSum:
    """A sink that sums each sample's captures in the coefficients of a basis.

    Attributes:
        coefficients: `batch p`, the contributions of the batch so far, in float32 at least.
        errors: norm of each sample's gradient with respect to the output of the layer that the
            backward pass reached first.
    """

    def __init__(self, basis: Basis, batch: int, like: Tensor) -> None:
        dtype = torch.promote_types(like.dtype, torch.float32)
        self._basis = basis
        self.coefficients: Float[Tensor, "batch p"] = torch.zeros(
            batch, basis.size, dtype=dtype, device=like.device
        )
        self.errors: Float[Tensor, " batch"] | None = None

    def __call__(self, binding: Binding, capture: Capture) -> None:
        rows = slice(capture.first, capture.first + capture.batch)
        span = self._basis.spans[binding.block_index]
        self.coefficients[rows, span] += self._basis.project_capture(binding, capture)

    def watch(self, gradient: Tensor) -> None:
        """Keep the norms of the first gradient, over a sample's positions and features."""
        if self.errors is None:
            flat = gradient.to(self.coefficients.dtype).reshape(len(self.coefficients), -1)
            self.errors = flat.norm(dim=1)


def sample_gradients(
    losses_of: LossesOf,
    batch: int,
    bindings: Bindings,
    basis: Basis,
    check: bool = False,
    weights: Float[Tensor, " batch"] | None = None,
) -> tuple[Float[Tensor, "batch p"], Float[Tensor, " batch"]]:
    """Return each sample's own loss gradient in the coefficients of `basis`, and its loss.

    No parameter's `.grad` is changed.

    Args:
        losses_of: runs some samples of a batch, given by their places, and returns one loss for
            each.
        batch: number of samples.
        bindings: the captured parameters.
        basis: the basis of the coefficients.
        check: whether to run a few of the samples alone, and compare.
        weights: of each sample's loss; 1 if None.

    Raises:
        SecateurError: a parameter is read where it cannot be captured, or a gradient is not what
            the sample gives alone.
    """
    bindings.locate(losses_of, batch)
    total = ContributionSum(basis, batch, next(iter(bindings.parameters().values())))
    with capture_hooks(bindings, total, batch) as hooks:
        values = losses_of(torch.arange(batch))
        loss = (values if weights is None else values * weights.to(values)).sum()
        if hooks.unfollowed or is_reentrant(loss):
            # Reentrant checkpointing runs a part of the model again, in `backward` only.
            trained = [p for p in bindings.model.parameters() if p.requires_grad]
            gradients_by_backward(loss, trained)
        else:
            torch.autograd.grad(loss, hooks.outputs, allow_unused=True)
    if check:
        check_reached(bindings, losses_of)

        def capture(weights: Tensor) -> Tensor:
            return sample_gradients(losses_of, batch, bindings, basis, weights=weights)[0]

        weights = torch.ones(batch) if weights is None else weights
        checker = SampleCheck(bindings, basis)
        checker.check(total.coefficients, weights, losses_of, hooks.half, capture)
    return total.coefficients, values.detach()

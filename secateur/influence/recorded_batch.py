"""The recorded batch: its samples, their weights and losses, and their contributions."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Float, Int
from torch import Tensor

from secateur.errors import SecateurError
from secateur.influence.basis import Basis
from secateur.influence.bindings import Bindings
from secateur.influence.hooks import ContributionSum, capture_hooks


class RecordedBatch:
    """One recorded batch or micro-batch.

    Set `losses`, one per sample, before the backward pass. If they are still part of its graph, the
    samples' weights are read from the gradient that reaches them, however the loss was reduced or
    scaled. Otherwise the weights are those that the caller gave.

    Attributes:
        samples: the samples' ids.
        weights: weight of each sample's loss in the loss that is differentiated.
        window: selection window of the step.
        coefficients: `batch p`, the contributions; None until the backward pass is done.
        errors: norm of the gradient of each sample's own loss with respect to the output of the
            last layer.
        shapes: the shapes with which the captured modules were called.
        half: whether anything was computed in half precision.
    """

    def __init__(
        self, samples: Int[Tensor, " batch"], weights: Float[Tensor, " batch"], window: int
    ) -> None:
        self.samples = samples
        self.weights = weights
        self.window = window
        self.coefficients: Float[Tensor, "batch p"] | None = None
        self.errors: Float[Tensor, " batch"] | None = None
        self.shapes: tuple[tuple[int, ...], ...] = ()
        self.half = False
        self._losses: Tensor | None = None

    @property
    def losses(self) -> Float[Tensor, " batch"] | None:
        """The samples' own losses before the step."""
        return self._losses

    @losses.setter
    def losses(self, losses: Float[Tensor, " batch"]) -> None:
        if losses.shape != self.samples.shape:
            raise SecateurError(
                f"losses of shape {tuple(losses.shape)} for {len(self.samples)} samples; give one "
                f"loss per sample"
            )
        if losses.requires_grad:
            losses.register_hook(self._read_weights)
        self._losses = losses.detach()

    def _read_weights(self, gradient: Tensor) -> None:
        self.weights = gradient.detach().double().cpu()


@contextmanager
def capture_batch(
    batch: RecordedBatch,
    bindings: Bindings,
    basis: Basis,
    like: Tensor,
    documents: Int[Tensor, "rows positions"] | None,
) -> Iterator[None]:
    """Capture a batch's contributions in the forward and backward pass inside the block.

    Args:
        batch: the batch, which gets its `coefficients` and `errors` at the end of the block.
        bindings: the captured layers.
        basis: the basis of the coefficients.
        like: a parameter.
        documents: as in `capture_hooks`.

    Raises:
        SecateurError: a layer sees another number of samples.
    """
    count = len(batch.samples)
    total = ContributionSum(basis, count, like)
    with capture_hooks(bindings, total, count, total.watch, documents) as hooks:
        yield
    batch.coefficients = total.coefficients
    batch.shapes = tuple(tuple(shape) for shapes in hooks.shapes.values() for shape in shapes)
    batch.half = hooks.half
    if total.errors is not None:
        batch.errors = total.errors / batch.weights.to(total.errors)


def finish_batch(batch: RecordedBatch, scale: float) -> None:
    """Apply the step's scale to a batch, and set unknown values to not-a-number."""
    unknown = torch.full((len(batch.samples),), float("nan"))
    batch.losses = unknown if batch.losses is None else batch.losses
    batch.errors = unknown if batch.errors is None else batch.errors
    if scale != 1.0 and batch.coefficients is not None:
        batch.coefficients = batch.coefficients * scale
        batch.weights = batch.weights * scale

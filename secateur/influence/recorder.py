"""The recorder, which turns a training loop's steps into segments."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from secateur.influence.basis import Basis
from secateur.influence.bindings import Bindings, LossesOf, bind_layers
from secateur.influence.capture.alone_check import SampleCheck
from secateur.influence.gradient_check import coarse_blocks, gradient_scale
from secateur.influence.hooks import sample_gradients
from secateur.influence.optimizers import UpdateRule, find_update_rule, unwrap_optimizer
from secateur.influence.process_group import current_ranks
from secateur.influence.projected_optimizer import ProjectedOptimizer
from secateur.influence.random_basis import default_basis
from secateur.influence.recorded_batch import RecordedBatch, capture_batch
from secateur.influence.recorded_step import RecordedStep
from secateur.influence.segment import Segment
from secateur.influence.segment_builder import SegmentBuilder
from secateur.influence.sharded_tensors import unwrap_model
from secateur.influence.step_hook import hook_before_step

# Relative distances allowed between the contributions' sum and the gradient received.
TOLERANCE = 1e-3
HALF_TOLERANCE = 2e-2  # if anything is computed in half precision
# A factor between the two that differs from 1 by less is rounding, and no clipping.
ROUNDING = 1e-4
HALF_ROUNDING = 5e-3
# In so many shapes of a batch are samples run alone. Texts of all lengths have hundreds.
CHECKED_SHAPES = 8


class Recorder:
    """A record of each sample's contribution to the gradient that the optimizer received.

    It works around any training loop::

        recorder = Recorder(model, optimizer)
        for ids in batches:
            optimizer.zero_grad()
            with recorder.batch(ids) as batch:
                batch.losses = losses = criterion(model(x[ids]), y[ids])  # one per sample
                losses.mean().backward()
            optimizer.step()
        segment = recorder.take_segment()

    Several `batch` blocks before one `optimizer.step()` are gradient accumulation. The recursion
    passes through a step without a block, without curvature. The recorder listens to
    `optimizer.step()`, so it sees what happens to the gradients before it (clipping by norm,
    unscaling) as a scale. A batch whose gradients were cleared without a step (a `GradScaler` that
    met an overflow) is forgotten.

    Under `torchrun`, with the model in `DistributedDataParallel` or after `fully_shard`, every
    process records its own samples and takes the same steps. Contributions are parts of the mean
    over the processes, which is the gradient that the optimizers receive.

    Attributes:
        update_rule: the optimizer's update rule.
        basis: the basis of the coefficients.
        parameters: the captured parameters by name.
        ranks: this process among those that train the model.

    Args:
        model: the model.
        optimizer: a known optimizer that trains all captured parameters.
        bindings: the layers to capture; all of the model's if None.
        basis: the basis; random if None. A linear update (SGD) then gets a Kronecker basis of
            rank 16 per side, any other update a basis of coordinates.
        tolerance: relative distance allowed between the contributions' sum and the gradient
            received. If None, it is 0.001, and 0.02 where anything is computed in half precision.
        coefficients: number of coordinates of a random basis, over all blocks.
        seed: of a random basis.
        uncaptured: shell-style patterns of parameters that need not be captured. Read only if
            `bindings` is None.

    Raises:
        SecateurError: the optimizer is not known, the basis cannot follow it, or a trainable
            parameter belongs to no known layer. Later, at a step: the contributions do not add
            up to the gradient.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        bindings: Bindings | None = None,
        basis: Basis | None = None,
        tolerance: float | None = None,
        *,
        coefficients: int = 2048,
        seed: int = 0,
        uncaptured: Collection[str] = (),
    ) -> None:
        optimizer = unwrap_optimizer(optimizer)
        model = unwrap_model(model)
        self.ranks = current_ranks()
        self.update_rule: UpdateRule = find_update_rule(optimizer)
        self._bindings = bind_layers(model, uncaptured) if bindings is None else bindings
        if basis is None:
            basis = default_basis(self._bindings, self.update_rule.linear, coefficients, seed)
        self.basis = basis
        self._tolerance = tolerance
        self.parameters = self._bindings.parameters()
        self._optimizer = ProjectedOptimizer(
            optimizer, self.update_rule, self.parameters, basis, self.ranks
        )
        self._coarse = coarse_blocks(model, basis)
        self._coming = RecordedStep()
        self._began = False
        self._last_scale = 1.0
        self._checked: set[object] = set()
        self._builder = SegmentBuilder(first_step=0)
        self._handle = hook_before_step(optimizer, self._record_step)

    @property
    def next_step(self) -> int:
        """The number of the step that the next `optimizer.step()` will be."""
        return self._builder.next_step

    def close(self) -> None:
        """Stop listening to the optimizer."""
        self._handle.remove()

    @contextmanager
    def batch(
        self,
        samples: Int[Tensor, " batch"] | Sequence[int],
        weights: Float[Tensor, " batch"] | None = None,
        window: int = 0,
        stride: float = 1.0,
        losses_of: LossesOf | None = None,
        documents: Int[Tensor, "rows positions"] | None = None,
    ) -> Iterator[RecordedBatch]:
        """Record the forward and backward pass inside the block.

        Args:
            samples: ids of the batch's samples, in the order of the batch: a tensor, a list or a
                range.
            weights: weight of each sample's loss in the loss that is differentiated; equal parts of
                a mean if None.
            window: selection window of the step; -1 to record for the curvature only.
            stride: the number of steps that this one's curvature represents.
            losses_of: runs the samples at some places of the batch, and returns one loss for each.
                By it the recorder finds where each parameter is read, and checks in the first
                batch of every shape that contributions are those of the samples they are recorded
                for. Without it, the samples must lie along every tensor's first dimension, and
                samples that are mixed or exchanged in the model are not noticed.
            documents: if several samples share a row of the batch, the place in `samples` of the
                one that each position belongs to, or -1. `losses_of` then gives each a row of its
                own.

        Raises:
            SecateurError: a layer sees another number of samples, or the contributions are not
                those of the samples alone.
        """
        self._forget_cleared_batches()
        if losses_of is not None:
            self._bindings.locate(losses_of, len(samples))
        ids = samples if isinstance(samples, Tensor) else torch.tensor(samples, dtype=torch.int64)
        if weights is None:
            weights = torch.full((len(ids),), 1.0 / len(ids), dtype=torch.float64)
        batch = RecordedBatch(ids, weights, window)
        first = next(iter(self.parameters.values()))
        with capture_batch(batch, self._bindings, self.basis, first, documents):
            yield batch
        if losses_of is not None:
            self._check_samples(batch, losses_of)
        self._coming.batches.append(batch)
        self._coming.stride = stride

    def record_fisher(
        self,
        losses_of: LossesOf,
        weights: Float[Tensor, " batch"],
        factors: Float[Tensor, " batch"] | None = None,
    ) -> None:
        """Record gradients whose outer products estimate the coming step's curvature, for `Fisher`.

        Args:
            losses_of: as in `batch`, with labels drawn from the model, or with a random sign at
                every output position.
            weights: as in `batch`.
            factors: by how much each outer product is multiplied; 1 if None. It is the number of
                output positions that the sample's loss is the mean of, times the samples of the
                step that this one stands for.
        """
        gradients, _ = sample_gradients(losses_of, len(weights), self._bindings, self.basis)
        divided = weights if factors is None else weights / factors.to(weights)
        counted = weights > 0  # a sample of an idle process weighs nothing
        rows = gradients * weights.to(gradients)[:, None]
        self._coming.fisher.append((rows[counted.to(rows.device)], divided[counted]))

    def record_hessian(self, flattened: Float[Tensor, " entries"]) -> None:
        """Record the Hessian or the Gauss-Newton matrix before the coming step.

        Args:
            flattened: as `compute_hessian` or `compute_gauss_newton` returns it.
        """
        self._builder.hessian.append((self.next_step, flattened))

    def step_sensitivity(self, gradient: Float[Tensor, " p"]) -> Float[Tensor, " p"]:
        """Return `dF/dg` of the coming step at a gradient, in float64.

        Each entry is what the step itself adds to a coefficient of theta per unit of gradient. The
        optimizer's learning rate must already be that of the step.
        """
        return self._optimizer.sensitivity(gradient)

    def skip_step(self) -> None:
        """Record a step that changed nothing, because a `GradScaler` met an overflow.

        Only loops that count such steps need it. The step's batches are forgotten.
        """
        self._coming = RecordedStep()
        theta = self._optimizer.states()[0]
        self._add_step(torch.zeros_like(theta), 1.0, list(self.parameters))

    def take_segment(self) -> Segment:
        """Return the segment recorded since the last call, on the CPU, and start the next one.

        With several processes, all call it. The first gets the records of all; the others get a
        segment without records.
        """
        builder = self._builder
        self._builder = SegmentBuilder(builder.next_step)
        parameter = next(iter(self.parameters.values()))
        dtype = torch.promote_types(parameter.dtype, torch.float32)
        return builder.build(self._optimizer.groups, dtype, self.ranks)

    def start_at(self, step: int) -> None:
        """Number the next step as `step` of its stage, and drop steps not yet taken."""
        self._builder = SegmentBuilder(step)

    def _check_samples(self, batch: RecordedBatch, losses_of: LossesOf) -> None:
        """Check a batch's contributions against samples that run alone, if its shape is new."""
        shape = (len(batch.samples), batch.shapes)
        if shape in self._checked or len(self._checked) == CHECKED_SHAPES:
            return
        assert batch.coefficients is not None
        if not bool(batch.coefficients.isfinite().all()):
            return  # a GradScaler skips such a step, and the check of the sum refuses any other
        check = SampleCheck(self._bindings, self.basis)

        def capture(weights: Tensor) -> Tensor:
            count = len(batch.samples)
            bindings = self._bindings
            return sample_gradients(losses_of, count, bindings, self.basis, weights=weights)[0]

        check.check(batch.coefficients, batch.weights, losses_of, batch.half, capture)
        self._checked.add(shape)

    def _forget_cleared_batches(self) -> None:
        """Drop recorded batches whose gradients were cleared without a step."""
        if self._coming.batches and not self._optimizer.has_gradient():
            self._coming = RecordedStep()

    def _record_step(self) -> None:
        """Record a step. The gradients are now those that the optimizer will use."""
        received = self._optimizer.gradient(self.next_step)
        scale = self._gradient_scale(received)
        skipped = self._optimizer.skipped(self.next_step)
        if skipped and not self._began:
            _warn_skipped(skipped)
        self._began = True
        self._add_step(received, scale, skipped)

    def _add_step(
        self, received: Float[Tensor, " p"], scale: float, skipped: Collection[str]
    ) -> None:
        share = 1 / self.ranks.size
        self._builder.add_step(self._coming, scale, self._optimizer.settings(skipped), share)
        if not self.update_rule.linear:
            self._builder.add_state(received, self._optimizer.states())
        self._coming = RecordedStep()

    def _gradient_scale(self, received: Float[Tensor, " p"]) -> float:
        """Return the scale of the coming step; without a batch, that of the step before."""
        total = self._coming.total(received, self.ranks)
        if total is not None:
            half = any(batch.half for batch in self._coming.batches)
            tolerance = HALF_TOLERANCE if half else TOLERANCE
            self._last_scale = gradient_scale(
                total,
                received,
                self.basis,
                tolerance if self._tolerance is None else self._tolerance,
                HALF_ROUNDING if half else ROUNDING,
                self.next_step,
                self._coarse,
            )
        return self._last_scale


def _warn_skipped(names: Collection[str]) -> None:
    """Warn of parameters without a gradient at the first step, which may have been forgotten."""
    warnings.warn(
        f"parameter {min(names)} got no gradient at the first step ({len(names)} parameters did "
        f"not); it is recorded as one that the step leaves as it is. If it never takes part in the "
        f"loss, freeze it or list it under `uncaptured`",
        stacklevel=2,
    )

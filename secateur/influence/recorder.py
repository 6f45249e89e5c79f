"""The recorder, which turns a training loop's steps into segments."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from secateur.errors import SecateurError
from secateur.influence.basis import Basis, basis_kind, restore_basis
from secateur.influence.basis_fitting import random_coordinates, random_kronecker_basis
from secateur.influence.bindings import Bindings, bind_layers
from secateur.influence.gradient_check import gradient_scale, parameter_groups
from secateur.influence.hooks import ContributionSum, capture_hooks, sample_gradients
from secateur.influence.optimizers import UpdateRule, find_update_rule
from secateur.influence.segment import Segment

# Columns per side of a block in the random basis that a recorder makes for SGD.
RANDOM_RANK = 16


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
    """

    def __init__(
        self, samples: Int[Tensor, " batch"], weights: Float[Tensor, " batch"], window: int
    ) -> None:
        self.samples = samples
        self.weights = weights
        self.window = window
        self.coefficients: Float[Tensor, "batch p"] | None = None
        self.errors: Float[Tensor, " batch"] | None = None
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


@dataclass
class _StepColumns:
    """The steps recorded since the last segment, one list entry per step."""

    batches: list[list[RecordedBatch]] = field(default_factory=list)
    strides: list[float] = field(default_factory=list)
    scales: list[float] = field(default_factory=list)
    hyper: list[list[list[float]]] = field(default_factory=list)
    gradients: list[Tensor] = field(default_factory=list)
    states: list[Tensor] = field(default_factory=list)
    fisher: list[list[tuple[Tensor, Tensor]]] = field(default_factory=list)
    hessian: list[tuple[int, Tensor]] = field(default_factory=list)


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

    Attributes:
        update_rule: the optimizer's update rule.
        basis: the basis of the coefficients.
        parameters: the captured parameters by name.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        bindings: Bindings | None = None,
        basis: Basis | None = None,
        tolerance: float = 1e-3,
        *,
        coefficients: int = 2048,
        seed: int = 0,
        uncaptured: Collection[str] = (),
    ) -> None:
        """Listen to an optimizer.

        Args:
            model: the model.
            optimizer: a known optimizer that trains all captured parameters.
            bindings: the layers to capture; all of the model's if None.
            basis: the basis; random if None. A linear update (SGD) then gets a Kronecker basis of
                rank 16 per side, any other update a basis of coordinates.
            tolerance: relative distance allowed between the contributions' sum and the gradient
                received.
            coefficients: number of coordinates of a random basis, over all blocks.
            seed: of a random basis.
            uncaptured: shell-style patterns of parameters that need not be captured. Read only if
                `bindings` is None.

        Raises:
            SecateurError: the optimizer is not known, the basis cannot follow it, or a trainable
                parameter belongs to no known layer. Later, at a step: the contributions do not add
                up to the gradient.
        """
        self.update_rule: UpdateRule = find_update_rule(optimizer)
        self._optimizer = optimizer
        self._bindings = bind_layers(model, uncaptured) if bindings is None else bindings
        if basis is None:
            basis = _random_basis(self.update_rule, self._bindings, coefficients, seed)
        self.basis = basis
        self._tolerance = tolerance
        names = {name for block in basis.blocks for name in block.parameters}
        self.parameters = {n: p for n, p in model.named_parameters() if n in names}
        self._groups = parameter_groups(optimizer, self.parameters, basis)
        if not (self.update_rule.linear or basis.elementwise):
            raise SecateurError(
                f"{type(optimizer).__name__} treats every parameter by its own history, which a "
                f"kronecker basis cannot follow; use a basis of coordinates (in a plan "
                f"`basis: {{kind: coordinates}}`)"
            )
        self._pending: list[RecordedBatch] = []
        self._pending_fisher: list[tuple[Tensor, Tensor]] = []
        self._stride = 0.0
        self._last_scale = 1.0
        self._first_step = 0
        self._steps = _StepColumns()
        self._handle = optimizer.register_step_pre_hook(self._before_step)

    @property
    def next_step(self) -> int:
        """The number of the step that the next `optimizer.step()` will be."""
        return self._first_step + len(self._steps.strides)

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
    ) -> Iterator[RecordedBatch]:
        """Record the forward and backward pass inside the block.

        Args:
            samples: ids of the batch's samples, in the order of the batch: a tensor, a list or a
                range.
            weights: weight of each sample's loss in the loss that is differentiated; equal parts of
                a mean if None.
            window: selection window of the step; -1 to record for the curvature only.
            stride: the number of steps that this one's curvature represents.

        Raises:
            SecateurError: a layer sees another number of samples.
        """
        self._forget_cleared_batches()
        ids = samples if isinstance(samples, Tensor) else torch.tensor(samples, dtype=torch.int64)
        if weights is None:
            weights = torch.full((len(ids),), 1.0 / len(ids), dtype=torch.float64)
        batch = RecordedBatch(ids, weights, window)
        first = next(iter(self.parameters.values()))
        total = ContributionSum(self.basis, len(ids), first.dtype, first.device)
        with capture_hooks(self._bindings, total, total.watch, len(ids)):
            yield batch
        batch.coefficients = total.coefficients
        if total.errors is not None:
            batch.errors = total.errors / batch.weights.to(total.errors)
        self._pending.append(batch)
        self._stride = stride

    def record_fisher(
        self, losses: Callable[[], Float[Tensor, " batch"]], weights: Float[Tensor, " batch"]
    ) -> None:
        """Record the coming step's contributions under labels sampled from the model.

        The curvature `Fisher` needs them.

        Args:
            losses: runs the forward pass and returns one loss per sample, with sampled labels.
            weights: as in `batch`.
        """
        gradients, _ = sample_gradients(losses, len(weights), self._bindings, self.basis)
        self._pending_fisher.append((gradients * weights.to(gradients)[:, None], weights))

    def record_hessian(self, flattened: Float[Tensor, " entries"]) -> None:
        """Record the Hessian before the coming step, as `compute_hessian` returns it."""
        self._steps.hessian.append((self.next_step, flattened))

    def step_sensitivity(self, gradient: Float[Tensor, " p"]) -> Float[Tensor, " p"]:
        """Return `dF/dg` of the coming step at a gradient, in float64.

        Each entry is what the step itself adds to a coefficient of theta per unit of gradient. The
        optimizer's learning rate must already be that of the step.
        """
        rows = [self._settings(group) for group in self._optimizer.param_groups]
        hyper = torch.tensor(rows, dtype=torch.float64)
        h = dict(zip(self.update_rule.hyper, hyper[self._groups].unbind(-1), strict=True))
        if self.update_rule.linear:
            count = len(self.update_rule.slots) + 1
            state = torch.zeros(count, self.basis.size, dtype=torch.float64)
        else:
            state = self._states().cpu().double()
        later = torch.zeros_like(state)
        later[0] = 1
        return self.update_rule.vjp(later, state, gradient.cpu().double(), h)[1]

    def take_segment(self) -> Segment:
        """Return the segment recorded since the last call, on the CPU, and start the next one."""
        steps = self._steps
        first = self._first_step
        self._steps = _StepColumns()
        self._first_step = first + len(steps.strides)
        dtype = next(iter(self.parameters.values())).dtype
        empty = torch.empty(0, self.basis.size, dtype=dtype)
        return Segment(
            first_step=first,
            groups=self._groups,
            **_record_tensors(steps, first, empty),
            **_step_tensors(steps, empty),
            **_curvature_tensors(steps, first, empty),
        )

    def start_at(self, step: int) -> None:
        """Number the next step as `step` of its stage, and drop steps not yet taken."""
        self._first_step = step
        self._steps = _StepColumns()

    def _forget_cleared_batches(self) -> None:
        """Drop recorded batches whose gradients were cleared without a step."""
        gradients = [p.grad for p in self.parameters.values()]
        if self._pending and all(grad is None or not grad.any() for grad in gradients):
            self._pending = []
            self._pending_fisher = []

    def _before_step(
        self, _: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Record a step just before the optimizer's own step.

        A step with a closure is recorded after the closure has run, because the closure computes
        the gradients.
        """
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is None:
            self._record_step()
            return None

        def recorded_closure() -> Any:
            loss = closure()
            self._record_step()
            return loss

        return args[:1], {"closure": recorded_closure}

    def _record_step(self) -> None:
        """Record a step. The gradients are now those that the optimizer will use."""
        received = self._received_gradient()
        scale = self._gradient_scale(received)
        for batch in self._pending:
            _finish_batch(batch, scale)
        steps = self._steps
        steps.batches.append(self._pending)
        steps.strides.append(self._stride if self._pending else 0.0)
        steps.scales.append(scale)
        steps.fisher.append([(rows * scale, w * scale) for rows, w in self._pending_fisher])
        steps.hyper.append([self._settings(group) for group in self._optimizer.param_groups])
        if not self.update_rule.linear:
            steps.gradients.append(received)
            steps.states.append(self._states())
        self._pending = []
        self._pending_fisher = []

    def _received_gradient(self) -> Float[Tensor, " p"]:
        """Return the gradient that the optimizer is about to use.

        Raises:
            SecateurError: a captured parameter has none.
        """
        gradients = {n: p.grad for n, p in self.parameters.items() if p.grad is not None}
        missing = [name for name in self.parameters if name not in gradients]
        if missing:
            raise SecateurError(
                f"parameter {missing[0]} got no gradient at step {self.next_step}; leave it "
                f"out of the model, freeze it, or list it under `uncaptured`"
            )
        return self.basis.project_tensors(gradients)

    def _gradient_scale(self, received: Float[Tensor, " p"]) -> float:
        """Return the scale of the coming step; without a batch, that of the step before."""
        sums = [b.coefficients.sum(0) for b in self._pending if b.coefficients is not None]
        if sums:
            total = torch.stack(sums).sum(0)
            self._last_scale = gradient_scale(
                total, received, self.basis, self._tolerance, self.next_step
            )
        return self._last_scale

    def _settings(self, group: dict[str, object]) -> list[float]:
        parameters = group["params"]
        assert isinstance(parameters, list)
        return self.update_rule.settings(group, self._optimizer.state.get(parameters[0], {}))

    def _states(self) -> Float[Tensor, "S p"]:
        """Return theta and the optimizer's slots in the coefficients of the basis."""
        theta = self.basis.project_tensors({n: p.detach() for n, p in self.parameters.items()})
        return torch.stack([theta, *(self._slot(name) for name in self.update_rule.slots)])

    def _slot(self, name: str) -> Float[Tensor, " p"]:
        """Return one slot of the optimizer's state; zero before the first step."""
        tensors = {}
        for parameter_name, parameter in self.parameters.items():
            value = self._optimizer.state.get(parameter, {}).get(name)
            tensors[parameter_name] = torch.zeros_like(parameter) if value is None else value
        return self.basis.project_tensors(tensors)


def _random_basis(
    update_rule: UpdateRule, bindings: Bindings, coefficients: int, seed: int
) -> Basis:
    """Return a random basis that can follow an update rule, on the parameters' device."""
    first = bindings.parameters()[0]
    basis: Basis
    if update_rule.linear:
        basis = random_kronecker_basis(bindings, RANDOM_RANK, seed, first.dtype)
    else:
        basis = random_coordinates(bindings, coefficients, seed)
    tensors = {name: tensor.to(first.device) for name, tensor in basis.tensors().items()}
    return restore_basis(basis_kind(basis), basis.blocks, tensors)


def _finish_batch(batch: RecordedBatch, scale: float) -> None:
    """Apply the step's scale to a batch, and set unknown values to not-a-number."""
    unknown = torch.full((len(batch.samples),), float("nan"))
    batch.losses = unknown if batch.losses is None else batch.losses
    batch.errors = unknown if batch.errors is None else batch.errors
    if scale != 1.0 and batch.coefficients is not None:
        batch.coefficients = batch.coefficients * scale
        batch.weights = batch.weights * scale


def _record_tensors(
    steps: _StepColumns, first_step: int, empty: Float[Tensor, "0 p"]
) -> dict[str, Tensor]:
    """Return the fields of a segment that have one row per record."""
    batches = [batch for one_step in steps.batches for batch in one_step]
    lengths = [sum(len(batch.samples) for batch in one_step) for one_step in steps.batches]
    numbers = torch.arange(first_step, first_step + len(lengths))
    contributions = [b.coefficients.cpu() for b in batches if b.coefficients is not None]
    return {
        "contributions": torch.cat([empty, *contributions]),
        "samples": _join_integers(b.samples.cpu().long() for b in batches),
        "positions": _join_integers(torch.arange(n) for n in lengths),
        "steps": numbers.repeat_interleave(torch.tensor(lengths, dtype=torch.int64)),
        "weights": _join_floats(b.weights for b in batches),
        "losses": _join_floats(b.losses for b in batches if b.losses is not None),
        "errors": _join_floats(b.errors for b in batches if b.errors is not None),
        "windows": _join_integers(torch.full((len(b.samples),), b.window) for b in batches),
    }


def _step_tensors(steps: _StepColumns, empty: Float[Tensor, "0 p"]) -> dict[str, Tensor]:
    """Return the fields of a segment that have one row per step."""
    # A tensor of an empty list would have one dimension.
    hyper = torch.empty(0, 0, 0, dtype=torch.float64)
    if steps.hyper:
        hyper = torch.tensor(steps.hyper, dtype=torch.float64)
    gradients = empty
    states = empty[:, None].expand(0, 0, empty.shape[1])
    if steps.gradients:
        gradients = torch.stack(steps.gradients).cpu()
        states = torch.stack(steps.states).cpu()
    return {
        "strides": torch.tensor(steps.strides, dtype=torch.float64),
        "scales": torch.tensor(steps.scales, dtype=torch.float64),
        "hyper": hyper,
        "gradients": gradients,
        "states": states,
    }


def _curvature_tensors(
    steps: _StepColumns, first_step: int, empty: Float[Tensor, "0 p"]
) -> dict[str, Tensor]:
    """Return the fields of a segment that serve the curvatures `fisher` and `hessian` only."""
    parts = [
        (first_step + i, rows, weights)
        for i, one_step in enumerate(steps.fisher)
        for rows, weights in one_step
    ]
    hessian = empty
    if steps.hessian:
        hessian = torch.stack([flattened.cpu() for _, flattened in steps.hessian])
    return {
        "fisher": torch.cat([empty, *(rows.cpu() for _, rows, _ in parts)]),
        "fisher_steps": _join_integers(torch.full((len(rows),), step) for step, rows, _ in parts),
        "fisher_weights": _join_floats(weights for _, _, weights in parts),
        "hessian": hessian,
        "hessian_steps": torch.tensor([step for step, _ in steps.hessian], dtype=torch.int64),
    }


def _join_integers(parts: Iterable[Tensor]) -> Int[Tensor, " n"]:
    return torch.cat([torch.empty(0, dtype=torch.int64), *parts])


def _join_floats(parts: Iterable[Tensor]) -> Float[Tensor, " n"]:
    return torch.cat([torch.empty(0, dtype=torch.float64), *(p.cpu().double() for p in parts)])

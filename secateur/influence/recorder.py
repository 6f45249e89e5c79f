"""Room `secateur`: the recorder, which turns a training loop's steps into segments."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from secateur.errors import SecateurError
from secateur.influence.basis import Basis
from secateur.influence.bindings import Bindings
from secateur.influence.gradient_check import gradient_scale, parameter_groups
from secateur.influence.hooks import ContributionSum, capture_hooks, sample_gradients
from secateur.influence.optimizers import UpdateRule, find_update_rule
from secateur.influence.segment import Segment


class RecordedBatch:
    """One recorded (micro-)batch.

    Set `losses`, one a sample, before the backward pass. Where they are still part of its graph, the samples' weights
    are read off the gradient that reaches them, however the loss was reduced or scaled; else they are those given.
    """

    def __init__(
        self, samples: Int[Tensor, " batch"], weights: Float[Tensor, " batch"], window: int
    ) -> None:
        self.samples, self.weights, self.window = samples, weights, window
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
                f"losses of shape {tuple(losses.shape)} for {len(self.samples)} samples; give one each"
            )
        if losses.requires_grad:
            losses.register_hook(self._weigh)
        self._losses = losses.detach()

    def _weigh(self, gradient: Tensor) -> None:
        self.weights = gradient.detach().double().cpu()


@dataclass
class _Steps:
    """The columns of the segment in the making, one list entry a step or a batch."""

    batches: list[list[RecordedBatch]] = field(default_factory=list)
    strides: list[float] = field(default_factory=list)
    scales: list[float] = field(default_factory=list)
    hyper: list[list[list[float]]] = field(default_factory=list)
    gradients: list[Tensor] = field(default_factory=list)
    states: list[Tensor] = field(default_factory=list)
    fisher: list[list[tuple[Tensor, Tensor]]] = field(default_factory=list)
    hessian: list[tuple[int, Tensor]] = field(default_factory=list)


class Recorder:
    """Records what each sample of each step contributed to the gradient that the optimizer received.

    Around any training loop::

        with recorder.batch(ids) as batch:
            losses = criterion(model(x), y)          # one a sample
            batch.losses = losses
            losses.mean().backward()
        optimizer.step()
        ...
        segment = recorder.take_segment()

    Several `batch` blocks before one `optimizer.step()` are gradient accumulation. A step without one is passed
    through by the recursion, without curvature. The recorder listens to `optimizer.step()`, so what happens to the
    gradients in between (clipping by norm, unscaling) is seen, as the scale it applied. A batch whose gradients were
    cleared without a step (a `GradScaler` that met an overflow) is forgotten.

    Args:
        model: its layers are those `bindings` names.
        optimizer: a known optimizer over exactly the bound parameters and those listed as uncaptured.
        tolerance: relative distance allowed between the contributions' sum and the gradient received.

    Raises:
        SecateurError: the optimizer is not known, or the basis cannot follow it; at a step, where the contributions
            do not add up to the gradient.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        bindings: Bindings,
        basis: Basis,
        tolerance: float = 1e-3,
    ) -> None:
        self.update_rule: UpdateRule = find_update_rule(optimizer)
        self._optimizer, self._bindings, self.basis, self._tolerance = (
            optimizer,
            bindings,
            basis,
            tolerance,
        )
        self._parameters = {
            n: p
            for n, p in model.named_parameters()
            if any(n in b.parameters for b in basis.blocks)
        }
        self._groups = parameter_groups(optimizer, self._parameters, basis)
        if not (self.update_rule.linear or basis.elementwise):
            raise SecateurError(
                f"{type(optimizer).__name__} treats every parameter by its own history, which a kronecker basis cannot "
                f"follow; set `basis: {{kind: coordinates}}`"
            )
        self._pending: list[RecordedBatch] = []
        self._stride = 0.0
        self._scale_before = 1.0
        self._pending_fisher: list[tuple[Tensor, Tensor]] = []
        self._first_step, self._steps = 0, _Steps()
        self._handle = optimizer.register_step_pre_hook(self._before_step)

    @property
    def next_step(self) -> int:
        """The step that the next `optimizer.step()` will be."""
        return self._first_step + len(self._steps.strides)

    def close(self) -> None:
        """Stops listening to the optimizer."""
        self._handle.remove()

    @contextmanager
    def batch(
        self,
        samples: Int[Tensor, " batch"],
        weights: Float[Tensor, " batch"] | None = None,
        window: int = 0,
        stride: float = 1.0,
    ) -> Iterator[RecordedBatch]:
        """Records the forward and backward pass inside the block.

        Args:
            samples: ids of the batch's samples, in the order of the batch.
            weights: weight of each sample's loss in the loss that is differentiated; equal parts of a mean if None.
            window: selection window the step falls in; -1 to record for the curvature only.
            stride: how many steps this one's curvature stands for.
        """
        first = next(iter(self._parameters.values()))
        if self._pending and all(
            p.grad is None or not p.grad.any() for p in self._parameters.values()
        ):
            self._pending, self._pending_fisher = [], []
        if weights is None:
            weights = torch.full((len(samples),), 1.0 / len(samples), dtype=torch.float64)
        batch = RecordedBatch(samples, weights, window)
        reducer = ContributionSum(self.basis, len(samples), first.dtype, first.device)
        with capture_hooks(self._bindings, reducer, reducer.watch, len(samples)):
            yield batch
        batch.coefficients = reducer.coefficients
        if reducer.errors is not None:
            batch.errors = reducer.errors / batch.weights.to(reducer.errors)
        self._pending.append(batch)
        self._stride = stride

    def record_fisher(
        self, losses: Callable[[], Float[Tensor, " batch"]], weights: Float[Tensor, " batch"]
    ) -> None:
        """Records the coming step's contributions under labels drawn from the model, for `curvature: fisher`.

        Args:
            losses: runs the forward pass and returns one loss a sample, against drawn labels.
            weights: as in `batch`.
        """
        numbers, _ = sample_gradients(losses, len(weights), self._bindings, self.basis)
        self._pending_fisher.append((numbers * weights.to(numbers)[:, None], weights))

    def record_hessian(self, flattened: Float[Tensor, " entries"]) -> None:
        """Records the Hessian before the coming step, as `secateur.hessian.hessian` gives it."""
        self._steps.hessian.append((self.next_step, flattened))

    def step_sensitivity(self, gradient: Float[Tensor, " p"]) -> Float[Tensor, " p"]:
        """`dF/dg` of the coming step at a gradient, in float64: what the step itself adds to each number of theta for a unit
        of gradient. The optimizer's learning rate must be the step's already."""
        hyper = torch.tensor(
            [self._settings(group) for group in self._optimizer.param_groups], dtype=torch.float64
        )
        h = dict(zip(self.update_rule.hyper, hyper[self._groups].unbind(-1), strict=True))
        state = torch.zeros(len(self.update_rule.slots) + 1, self.basis.size, dtype=torch.float64)
        if not self.update_rule.linear:
            state = self._states().cpu().double()
        later = torch.zeros_like(state)
        later[0] = 1
        return self.update_rule.vjp(later, state, gradient.cpu().double(), h)[1]

    def take_segment(self) -> Segment:
        """The segment recorded since the last `take_segment`, on the CPU; the next one starts empty."""
        steps, first, width = self._steps, self._first_step, self.basis.size
        self._steps, self._first_step = _Steps(), first + len(steps.strides)
        batches = [batch for one_step in steps.batches for batch in one_step]
        lengths = [sum(len(b.samples) for b in one_step) for one_step in steps.batches]
        numbered = torch.arange(first, first + len(lengths))
        ids = torch.empty(0, dtype=torch.int64)
        none = torch.empty(0, dtype=torch.float64)
        fisher = [
            (f, numbered[i].expand(len(f[0])))
            for i, drawn in enumerate(steps.fisher)
            for f in drawn
        ]
        numbers = torch.empty(0, width, dtype=next(iter(self._parameters.values())).dtype)
        return Segment(
            contributions=torch.cat(
                [numbers, *(b.coefficients.cpu() for b in batches if b.coefficients is not None)]
            ),
            samples=torch.cat([ids, *(b.samples.cpu().long() for b in batches)]),
            positions=torch.cat([ids, *(torch.arange(n) for n in lengths)]),
            steps=numbered.repeat_interleave(torch.tensor(lengths, dtype=torch.int64)),
            weights=torch.cat([none, *(b.weights.cpu().double() for b in batches)]),
            losses=torch.cat(
                [none, *(b.losses.cpu().double() for b in batches if b.losses is not None)]
            ),
            errors=torch.cat(
                [none, *(b.errors.cpu().double() for b in batches if b.errors is not None)]
            ),
            windows=torch.cat([ids, *(torch.full((len(b.samples),), b.window) for b in batches)]),
            first_step=first,
            strides=torch.tensor(steps.strides, dtype=torch.float64),
            scales=torch.tensor(steps.scales, dtype=torch.float64),
            hyper=torch.tensor(steps.hyper, dtype=torch.float64),
            gradients=torch.stack(steps.gradients).cpu() if steps.gradients else numbers,
            states=torch.stack(steps.states).cpu()
            if steps.states
            else numbers[:, None].expand(0, 0, width),
            groups=self._groups,
            fisher=torch.cat([numbers, *(f[0].cpu() for f, _ in fisher)]),
            fisher_steps=torch.cat([ids, *(s for _, s in fisher)]),
            fisher_weights=torch.cat([none, *(f[1].cpu().double() for f, _ in fisher)]),
            hessian=torch.stack([h.cpu() for _, h in steps.hessian]) if steps.hessian else numbers,
            hessian_steps=torch.tensor([step for step, _ in steps.hessian], dtype=torch.int64),
        )

    def start_at(self, step: int) -> None:
        """Counts the next step as `step` of its stage."""
        self._first_step, self._steps = step, _Steps()

    def _before_step(
        self, _: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Runs just before the optimizer's own step; where that is given a closure, once the closure has been called."""
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is None:
            self._record()
            return None

        def recorded() -> Any:
            loss = closure()
            self._record()
            return loss

        return args[:1], {"closure": recorded}

    def _record(self) -> None:
        """Takes in a step: the gradients are those that the optimizer will use."""
        missing = [name for name, p in self._parameters.items() if p.grad is None]
        if missing:
            raise SecateurError(
                f"parameter {missing[0]} got no gradient at step {self.next_step}; leave it "
                f"out of the model, freeze it, or list it under `uncaptured`"
            )
        received = self.basis.project_tensors(
            {n: p.grad for n, p in self._parameters.items() if p.grad is not None}
        )
        if self._pending:
            total = torch.stack(
                [b.coefficients.sum(0) for b in self._pending if b.coefficients is not None]
            ).sum(0)
            self._scale_before = gradient_scale(
                total, received, self.basis, self._tolerance, self.next_step
            )
        scale = self._scale_before
        for batch in self._pending:
            unknown = torch.full((len(batch.samples),), float("nan"))
            batch.losses = unknown if batch.losses is None else batch.losses
            batch.errors = unknown if batch.errors is None else batch.errors
            if scale != 1.0 and batch.coefficients is not None:
                batch.coefficients, batch.weights = batch.coefficients * scale, batch.weights * scale
        steps = self._steps
        steps.batches.append(self._pending)
        steps.strides.append(self._stride if self._pending else 0.0)
        steps.scales.append(scale)
        steps.fisher.append(
            [(numbers * scale, weights * scale) for numbers, weights in self._pending_fisher]
        )
        steps.hyper.append([self._settings(group) for group in self._optimizer.param_groups])
        if not self.update_rule.linear:
            steps.gradients.append(received)
            steps.states.append(self._states())
        self._pending, self._pending_fisher = [], []

    def _settings(self, group: dict[str, object]) -> list[float]:
        parameters = group["params"]
        assert isinstance(parameters, list)
        return self.update_rule.settings(group, self._optimizer.state.get(parameters[0], {}))

    def _states(self) -> Float[Tensor, "S p"]:
        """Theta and the optimizer's slots in the numbers of the basis."""
        theta = self.basis.project_tensors({n: p.detach() for n, p in self._parameters.items()})
        return torch.stack([theta, *(self._slot(name) for name in self.update_rule.slots)])

    def _slot(self, name: str) -> Float[Tensor, " p"]:
        """One slot of the optimizer's state in the numbers of the basis; zero before the first step."""
        held = {n: self._optimizer.state.get(p, {}).get(name) for n, p in self._parameters.items()}
        return self.basis.project_tensors(
            {n: torch.zeros_like(self._parameters[n]) if v is None else v for n, v in held.items()}
        )

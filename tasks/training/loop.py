"""The training loop of one stage, which the seed determines step by step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from secateur.errors import PlanError
from secateur.influence.basis import Basis
from secateur.influence.bindings import Bindings, LossesOf
from secateur.influence.process_group import Ranks
from secateur.influence.recorded_batch import RecordedBatch
from secateur.influence.recorder import Recorder
from secateur.influence.sharded_tensors import is_sharded, whole_tensor
from secateur.storage.shards import Samples
from secateur.tasks.data.batches import BatchSchedule
from secateur.tasks.data.collate import Tensors, collate
from secateur.tasks.data.take_samples import DOCUMENTS, take_samples
from secateur.tasks.plan import Plan
from secateur.tasks.run import LearningTask, Run
from secateur.tasks.training.checkpoint import capture_state, load_state
from secateur.tasks.training.distribution import delay_exchange, distribute_model
from secateur.tasks.training.division import Part, divide_batch, process_seed
from secateur.tasks.training.optimizers import build_optimizer


@dataclass(frozen=True)
class MicroBatch:
    """Samples that pass through the model together.

    Attributes:
        rows: of the stage's sample table.
        weights: of each sample's loss in the step's loss.
        is_idle: whether its samples count for nothing, and only keep this process in step with
            others.
        seed: of the random draws from here on; None to go on with those of the micro-batch before.
    """

    rows: Int[Tensor, " batch"]
    tensors: Tensors
    weights: Float[Tensor, " batch"]
    is_idle: bool = False
    seed: int | None = None

    @property
    def documents(self) -> Int[Tensor, "rows positions"] | None:
        """The sample that each position belongs to, if several share a row."""
        return self.tensors.get(DOCUMENTS)


# Records one micro-batch while the context is open.
Recording = Callable[[MicroBatch], AbstractContextManager[RecordedBatch | None]]


class TrainingLoop:
    """Model, optimizer and data of one stage. A step depends on its number and the state only.

    Attributes:
        scale: factor that clipping multiplied the last step's gradient by.
        excluded: the rows of samples that weigh nothing in a step.
        selected_rows: rows that online selection chose for a step, in place of the schedule's.
        segment_processes: how many processes trained each committed segment. A single process that
            repeats such a segment makes the parts of all of them, with their random draws.

    Args:
        ranks: this process among those that take the steps together. Each takes its part of every
            batch.
        shard: how they divide the model, as in the plan's `launch`.
    """

    def __init__(
        self,
        run: Run,
        number: int,
        samples: Samples,
        ranks: Ranks | None = None,
        shard: str = "none",
    ) -> None:
        self.run = run
        self.samples = samples
        self.scale = 1.0
        self.excluded: dict[int, Tensor] = {}
        self.selected_rows: dict[int, Tensor] = {}
        self.segment_processes: list[int] = []
        self.ranks = ranks or Ranks()
        self.schedule = BatchSchedule(run.plan, number, len(samples))
        self.task: LearningTask = run.task()
        self.model = run.model()
        self._called_model = distribute_model(
            self.model, self.ranks, shard, may_skip_parameters=bool(run.plan.uncaptured)
        )
        self.optimizer = build_optimizer(run.plan.optimizer, self.model)

    def step(self, step: int, recording: Recording | None = None) -> Float[Tensor, " batch"]:
        """Take one optimizer step.

        Args:
            recording: if given, each micro-batch runs within it.

        Returns:
            The loss of every sample of this process before the step.
        """
        losses = self.backward(step, recording)
        self.set_rates(step)
        if largest := self.run.plan.optimizer.clip_norm:
            norm = float(whole_tensor(nn.utils.clip_grad_norm_(self.model.parameters(), largest)))
            # The factor that torch's clipping applies.
            self.scale = min(1.0, largest / (norm + 1e-6))
        self.optimizer.step()
        return losses

    def losses(self, tensors: Tensors, model: nn.Module | None = None) -> Tensor:
        """Return one loss per sample, in the plan's precision.

        Args:
            tensors: of the samples.
            model: the model to run; the loop's if None.
        """
        with self.precision():
            return self.task.losses(model or self.model, tensors)

    def precision(self) -> AbstractContextManager[object]:
        """Return the context in which the model runs: autocast, if the plan has it."""
        return precision(self.run.plan)

    def losses_of(
        self, tensors: Tensors, compute: Callable[[nn.Module, Tensors], Tensor] | None = None
    ) -> LossesOf:
        """Return a function that runs the samples at some places of a batch, in one row each.

        Args:
            compute: returns one loss per sample; the task's `losses` if None.
        """
        task_losses = compute or self.task.losses

        def losses_of(rows: Tensor) -> Tensor:
            with self.precision():
                return task_losses(self.model, take_samples(tensors, rows))

        return losses_of

    def set_rates(self, step: int) -> None:
        """Set the optimizer's learning rates to those of a step."""
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * self.schedule.rate_factor(step)

    def backward(self, step: int, recording: Recording | None = None) -> Float[Tensor, " batch"]:
        """Compute a step's gradients into `.grad`, and return the loss of every sample."""
        torch.manual_seed(process_seed(self.schedule.seed(step), self.ranks.rank))
        self.optimizer.zero_grad(set_to_none=True)
        step_losses = [torch.empty(0)]
        parts = self.micro_batches(step)
        for number, part in enumerate(parts):
            # Processes average their gradients, and a step's gradient is a weighted sum.
            weights = part.weights * self.ranks.size
            context: AbstractContextManager[RecordedBatch | None] = nullcontext()
            if recording is not None and not part.is_idle:
                context = recording(replace(part, weights=weights))
            is_last = number == len(parts) - 1
            with delay_exchange(self._called_model, is_last), context as record:
                losses = self.part_losses(part, self._called_model)
                losses = self.check_losses(losses, part.rows, step)
                (losses * weights.to(losses)).sum().backward()
                if record is not None:
                    record.losses = losses.detach()
            if not part.is_idle:
                step_losses.append(losses.detach())
        return torch.cat([values.to(step_losses[-1]) for values in step_losses])

    def part_losses(self, part: MicroBatch, model: nn.Module) -> Float[Tensor, " batch"]:
        """Return the losses of a micro-batch, with its own random draws."""
        if part.seed is not None:
            torch.manual_seed(part.seed)
        return self.losses(part.tensors, model)

    @property
    def is_sharded(self) -> bool:
        """Whether several processes hold parts of each parameter."""
        return any(is_sharded(p) for p in self.model.parameters())

    def micro_batches(self, step: int) -> list[MicroBatch]:
        """Return what this process trains on in a step. All processes must call it."""
        parts, seeds = self._parts(step)
        batches = [self.batch(part.rows) for part in parts]
        sizes = [
            self.sizes(batch, len(part.rows)) * (not part.is_idle)
            for batch, part in zip(batches, parts, strict=True)
        ]
        weights = sizes
        if self.run.plan.task.reduction != "sum":
            total = self.ranks.sum(torch.cat(sizes).sum())
            weights = [size / total for size in sizes]
        excluded = self.excluded.get(step)
        if excluded is not None:
            weights = [
                torch.where(torch.isin(part.rows, excluded), 0, weight)
                for part, weight in zip(parts, weights, strict=True)
            ]
        return [
            MicroBatch(part.rows, batch, weight, part.is_idle, seed)
            for part, batch, weight, seed in zip(parts, batches, weights, seeds, strict=True)
        ]

    def _parts(self, step: int) -> tuple[list[Part], list[int | None]]:
        """This process's parts of a step's batch, and the seed of each that begins another one's.

        A single process has the parts of all that trained the step before.
        """
        rows = self.selected_rows.get(step)
        if rows is None:
            rows = self.schedule.batch(step)
        accumulate = self.schedule.stage.accumulate
        if self.ranks.size > 1:
            own = divide_batch(rows, self.ranks.size, accumulate)[self.ranks.rank]
            return own, [None] * len(own)
        segment = step // self.run.plan.segment_steps
        trained = segment < len(self.segment_processes)
        processes = self.segment_processes[segment] if trained else 1
        parts: list[Part] = []
        seeds: list[int | None] = []
        for rank, share in enumerate(divide_batch(rows, processes, accumulate)):
            own = [part for part in share if not part.is_idle]
            parts += own
            seed = process_seed(self.schedule.seed(step), rank) if processes > 1 else None
            seeds += [seed, *[None] * (len(own) - 1)][: len(own)]
        return parts, seeds

    def batch(self, rows: Int[Tensor, " batch"], samples: Samples | None = None) -> Tensors:
        """Return the task's tensors of some rows, on the plan's device.

        Args:
            samples: where the rows are; the stage's samples if None.
        """
        return collate(self.task, samples or self.samples, rows, self.run.plan.device)

    def sizes(self, batch: Tensors, count: int) -> Float[Tensor, " batch"]:
        """Return how much each sample counts in the reduction: 1, or its number of tokens."""
        if self.run.plan.task.reduction == "token_mean":
            sizes: Tensor = self.task.sizes(batch)  # type: ignore[attr-defined]  # see Run.task
            return sizes.double().cpu()
        return torch.ones(count, dtype=torch.float64)

    def check_losses(self, losses: Tensor, rows: Tensor, step: int) -> Tensor:
        """Return the losses of some rows at a step, if they are right.

        Raises:
            PlanError: they are not one per sample, or not finite.
        """
        if losses.shape != rows.shape:
            raise PlanError(
                f"{self.run.plan.task.factory}.losses returned shape {tuple(losses.shape)} for "
                f"{len(rows)} samples; it must return one loss per sample"
            )
        values = losses.detach()
        bad = (~values.isfinite()).nonzero().flatten().cpu()
        if len(bad):
            key = self.samples.keys([int(rows[bad[0]])])[0]
            raise PlanError(
                f"the loss of sample {key} is {float(values[bad[0]]):g} at step {step} of stage "
                f"{self.schedule.number} ({len(bad)} of {len(rows)} samples of the batch); lower "
                f"the learning rate or look at the sample"
            )
        return losses

    def capture_state(self) -> Tensors:
        """Return copies of weights, buffers and optimizer state, by name.

        All processes must call it. Only the first gets them.
        """
        return capture_state(self.model, self.optimizer, keep=self.ranks.is_first)

    def load_state(self, tensors: Tensors, optimizer: bool = True) -> None:
        """Load the state that `capture_state` returned.

        Args:
            optimizer: whether to load the optimizer's state; it is reset otherwise.
        """
        load_state(tensors, self.model, self.optimizer, optimizer)

    @cached_property
    def bindings(self) -> Bindings:
        """Which layers of the model are captured."""
        return self.run.bindings(self.model)

    @cached_property
    def basis(self) -> Basis:
        """The run's basis."""
        return self.run.basis(self.bindings)

    def recorder(self) -> Recorder:
        """Return a recorder of this loop's steps in the run's basis."""
        return Recorder(self.model, self.optimizer, self.bindings, self.basis)


def precision(plan: Plan) -> AbstractContextManager[object]:
    """Return the context in which a plan's model runs: autocast, if the plan has it."""
    if plan.autocast is None:
        return nullcontext()
    return torch.autocast(torch.device(plan.device).type, getattr(torch, plan.autocast))


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Put the model in eval mode within the block, and every module back in its mode after."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode

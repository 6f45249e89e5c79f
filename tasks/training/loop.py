"""The training loop of one stage, which the seed determines step by step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from secateur.errors import PlanError
from secateur.influence.bindings import LossesOf
from secateur.influence.recorded_batch import RecordedBatch
from secateur.influence.recorder import Recorder
from secateur.storage.shards import Samples
from secateur.tasks.data.batches import BatchSchedule
from secateur.tasks.data.collate import Tensors, collate
from secateur.tasks.data.take_samples import DOCUMENTS, take_samples
from secateur.tasks.plan import Plan
from secateur.tasks.run import LearningTask, Run
from secateur.tasks.training.checkpoint import capture_state, load_state
from secateur.tasks.training.optimizers import build_optimizer


@dataclass(frozen=True)
class MicroBatch:
    """Samples that pass through the model together.

    Attributes:
        rows: of the stage's sample table.
        weights: of each sample's loss in the step's loss.
    """

    rows: Int[Tensor, " batch"]
    tensors: Tensors
    weights: Float[Tensor, " batch"]

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
        excluded: a step and the row of a sample that weighs nothing in that step.
        selected_rows: rows that online selection chose for a step, in place of the schedule's.
    """

    def __init__(self, run: Run, number: int, samples: Samples) -> None:
        self.run = run
        self.samples = samples
        self.scale = 1.0
        self.excluded = (-1, -1)
        self.selected_rows: dict[int, Tensor] = {}
        self.schedule = BatchSchedule(run.plan, number, len(samples))
        self.task: LearningTask = run.task()
        self.model = run.model()
        self.optimizer = build_optimizer(run.plan.optimizer, self.model)

    def step(self, step: int, recording: Recording | None = None) -> Float[Tensor, " batch"]:
        """Take one optimizer step.

        Args:
            recording: if given, each micro-batch runs within it.

        Returns:
            The loss of every sample before the step.
        """
        losses = self.backward(step, recording)
        self.set_rates(step)
        if largest := self.run.plan.optimizer.clip_norm:
            norm = float(nn.utils.clip_grad_norm_(self.model.parameters(), largest))
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

    def losses_of(self, tensors: Tensors) -> LossesOf:
        """Return a function that runs the samples at some places of a batch, in one row each."""

        def losses_of(rows: Tensor) -> Tensor:
            return self.losses(take_samples(tensors, rows))

        return losses_of

    def set_rates(self, step: int) -> None:
        """Set the optimizer's learning rates to those of a step."""
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * self.schedule.rate_factor(step)

    def backward(self, step: int, recording: Recording | None = None) -> Float[Tensor, " batch"]:
        """Compute a step's gradients into `.grad`, and return the loss of every sample."""
        torch.manual_seed(self.schedule.seed(step))
        self.optimizer.zero_grad(set_to_none=True)
        step_losses = []
        for part in self.micro_batches(step):
            context = recording(part) if recording else nullcontext()
            with context as record:
                losses = self.losses(part.tensors)
                losses = self.check_losses(losses, part.rows, step)
                (losses * part.weights.to(losses)).sum().backward()
                if record is not None:
                    record.losses = losses.detach()
            step_losses.append(losses.detach())
        return torch.cat(step_losses)

    def micro_batches(self, step: int) -> list[MicroBatch]:
        """Return what a step trains on."""
        rows = self.selected_rows.get(step)
        if rows is None:
            rows = self.schedule.batch(step)
        parts = rows.chunk(min(self.schedule.stage.accumulate, len(rows)))
        batches = [self.batch(part) for part in parts]
        sizes = [self.sizes(batch, len(part)) for batch, part in zip(batches, parts, strict=True)]
        total = 1.0 if self.run.plan.task.reduction == "sum" else torch.cat(sizes).sum()
        weights = [size / total for size in sizes]
        if self.excluded[0] == step:
            weights = [
                torch.where(part == self.excluded[1], 0, weight)
                for part, weight in zip(parts, weights, strict=True)
            ]
        return [MicroBatch(*fields) for fields in zip(parts, batches, weights, strict=True)]

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
        """Return copies of weights, buffers and optimizer state, by name."""
        return capture_state(self.model, self.optimizer)

    def load_state(self, tensors: Tensors, optimizer: bool = True) -> None:
        """Load the state that `capture_state` returned.

        Args:
            optimizer: whether to load the optimizer's state; it is reset otherwise.
        """
        load_state(tensors, self.model, self.optimizer, optimizer)

    def recorder(self) -> Recorder:
        """Return a recorder of this loop's steps in the run's basis."""
        bindings = self.run.bindings(self.model)
        return Recorder(self.model, self.optimizer, bindings, self.run.basis(bindings))


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

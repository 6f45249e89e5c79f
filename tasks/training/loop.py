"""Room `tasks`: the training loop of one stage, which the seed determines step by step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from secateur.errors import PlanError
from secateur.influence.recorder import Recorder
from secateur.storage.shards import Samples
from secateur.tasks.data.batches import BatchSchedule
from secateur.tasks.run.run import LearningTask, Run
from secateur.tasks.training.checkpoint import Tensors, capture_state, load_state
from secateur.tasks.training.optimizer import build_optimizer


@dataclass(frozen=True)
class MicroBatch:
    """Samples that go through the model at once: their rows, tensors, and weights in the step's loss."""

    rows: Int[Tensor, " batch"]
    tensors: Tensors
    weights: Float[Tensor, " batch"]


class TrainingLoop:
    """Model, optimizer and data of one stage; every step depends on its number and the weights alone.

    Attributes:
        scale: what clipping multiplied the last step's gradient by.
        left_out: a step and a sample's row; in that step the sample weighs nothing.
        chosen: rows that online selection has chosen for a step, instead of those that the order gives.
    """

    def __init__(self, run: Run, number: int, samples: Samples) -> None:
        self.run, self.samples = run, samples
        self.scale, self.excluded = 1.0, (-1, -1)
        self.chosen: dict[int, Tensor] = {}
        self.order = BatchSchedule(run.plan, number, len(samples))
        self.task: LearningTask = run.task()
        self.model = run.model()
        self.optimizer = build_optimizer(run.plan.optimizer, self.model)

    def step(
        self, step: int, recording: Callable[..., Any] | None = None
    ) -> Float[Tensor, " batch"]:
        """One optimizer step; each of its micro-batches runs within `recording(rows, weights)` where that is given.

        Returns:
            The loss of every sample before the step.
        """
        self.backward(step, recording)
        self.set_rates(step)
        if largest := self.run.plan.optimizer.clip_norm:
            norm = float(nn.utils.clip_grad_norm_(self.model.parameters(), largest))
            self.scale = min(1.0, largest / (norm + 1e-6))  # as torch clips
        self.optimizer.step()
        return self._losses

    def set_rates(self, step: int) -> None:
        """Gives the optimizer the learning rates of a step."""
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * self.order.rate(step)

    def backward(self, step: int, recording: Callable[..., Any] | None = None) -> None:
        """The gradients of a step, left in `.grad`."""
        torch.manual_seed(self.order.seed(step))
        self.optimizer.zero_grad(set_to_none=True)
        losses = []
        for part in self.micro_batches(step):
            with recording(part.rows, part.weights) if recording else _nothing() as record:
                losses.append(
                    self.checked(self.task.losses(self.model, part.tensors), part.rows, step)
                )
                (losses[-1] * part.weights.to(losses[-1])).sum().backward()
                if record is not None:
                    record.losses = losses[-1].detach()
        self._losses = torch.cat([loss.detach() for loss in losses])

    def micro_batches(self, step: int) -> list[MicroBatch]:
        """What a step trains on."""
        rows = self.chosen[step] if step in self.chosen else self.order.batch(step)
        parts = rows.chunk(min(self.order.stage.accumulate, len(rows)))
        batches = [self.batch(part) for part in parts]
        sizes = [self.sizes(batch, len(part)) for batch, part in zip(batches, parts, strict=True)]
        total = 1.0 if self.run.plan.task.reduction == "sum" else torch.cat(sizes).sum()
        weights = [size / total for size in sizes]
        if self.excluded[0] == step:
            weights = [
                torch.where(part == self.excluded[1], 0, w)
                for part, w in zip(parts, weights, strict=True)
            ]
        return [MicroBatch(*fields) for fields in zip(parts, batches, weights, strict=True)]

    def batch(self, rows: Int[Tensor, " batch"], samples: Samples | None = None) -> Tensors:
        """The task's tensors of some rows, of the stage's samples or others, on the plan's device."""
        return collate(self.task, samples or self.samples, rows, self.run.plan.device)

    def sizes(self, batch: Tensors, count: int) -> Float[Tensor, " batch"]:
        """What each sample counts for in the reduction."""
        if self.run.plan.task.reduction == "token_mean":
            sizes: Tensor = self.task.sizes(batch)  # type: ignore[attr-defined]  # checked by Run.task
            return sizes.double().cpu()
        return torch.ones(count, dtype=torch.float64)

    def checked(self, losses: Tensor, rows: Tensor, step: int) -> Tensor:
        """The losses of some rows at a step.

        Raises:
            PlanError: they are not one a sample, or not finite.
        """
        if losses.shape != rows.shape:
            raise PlanError(
                f"{self.run.plan.task.factory}.losses gave shape {tuple(losses.shape)} for {len(rows)} samples; it must "
                f"give one loss a sample"
            )
        values = losses.detach()
        bad = (~values.isfinite()).nonzero().flatten().cpu()
        if len(bad):
            key = self.samples.keys([int(rows[bad[0]])])[0]
            raise PlanError(
                f"the loss of sample {key} is {float(values[bad[0]]):g} at step {step} of stage {self.order.number} "
                f"({len(bad)} of {len(rows)} samples of the batch); lower the learning rate or look at the sample"
            )
        return losses

    def tensors(self) -> Tensors:
        """Weights, buffers and optimizer state, by name."""
        return capture_state(self.model, self.optimizer)

    def restore(self, tensors: Tensors, optimizer: bool = True) -> None:
        """Takes up the state that `tensors()` gave; without `optimizer` its state is reset."""
        load_state(tensors, self.model, self.optimizer, optimizer)

    def recorder(self) -> Recorder:
        """A recorder of this loop's steps in the run's basis."""
        bindings = self.run.bindings(self.model)
        return Recorder(self.model, self.optimizer, bindings, self.run.basis(bindings))


def collate(
    task: LearningTask, samples: Samples, rows: Int[Tensor, " batch"], device: str
) -> Tensors:
    """Reads and decodes samples.

    Raises:
        PlanError: the task cannot decode one; it is named.
    """
    read = samples.read(rows.tolist())
    try:
        return {name: t.to(device) for name, t in task.collate(read).items()}
    except Exception as error:
        for sample in read:
            try:
                task.collate([sample])
            except Exception as own:
                raise PlanError(
                    f"sample {sample['__key__']} of {samples.shard_of(sample['__key__'])} cannot be decoded by the task "
                    f"({type(own).__name__}: {own}); mend or remove it"
                ) from own
        raise PlanError(
            f"the task cannot collate a batch ({type(error).__name__}: {error})"
        ) from error


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Puts the model in eval mode within the block, and every module back in its own after."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def _nothing() -> Iterator[None]:
    yield None

"""Room `flows.trainers`: a callback that records what Lightning's `Trainer` trains."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import ExitStack
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from secateur.errors import PlanError
from secateur.flows.trainers.recording import Recording
from secateur.influence.recorder import RecordedBatch
from secateur.tasks.external.recording import Keys
from secateur.tasks.plan import Plan


class RecordingCallback(Callback):
    """Records a stage of a plan while a `Trainer` trains it by automatic optimization, and tells Prefect at the end::

        trainer = Trainer(max_steps=200, callbacks=[RecordingCallback("plan.yaml", stage=0, model="net")])
        trainer.fit(module, batches)      # each batch holds its samples' keys under "__key__"

    Where `training_step` leaves one loss a sample in `self.sample_losses`, with its graph, losses and weights are read off
    it; else every sample weighs as much as any other, and losses are not known.

    Args:
        model: name of the submodule that is the plan's model; the module itself if empty.
        keys: gives the samples' keys (or their numbers in the run's list) from a batch.
        tolerance: relative distance allowed between the contributions' sum and the gradient; about 0.02 with bfloat16.
    """

    def __init__(
        self,
        plan: Plan | str | Path,
        stage: int,
        model: str = "",
        keys: Callable[[Any], Keys] = itemgetter("__key__"),
        tolerance: float = 1e-3,
    ) -> None:
        self._plan, self._stage, self._model, self._keys, self._tolerance = (
            plan,
            stage,
            model,
            keys,
            tolerance,
        )
        self._block = ExitStack()
        self._batch: RecordedBatch | None = None
        self.recording: Recording | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begins once model and optimizer are made."""
        _check_trainer(trainer, pl_module)
        steps = trainer.estimated_stepping_batches
        self.recording = Recording(
            self._plan, self._stage, pl_module.get_submodule(self._model), trainer.optimizers[0],
            steps=int(steps) if math.isfinite(steps) else None, by="lightning", tolerance=self._tolerance,
        )  # fmt: skip
        self.recording.prepare()
        trainer.should_stop |= self.recording.finished

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Announces a batch, or a part of one, where the ledger wants its step."""
        assert self.recording is not None
        if self.recording.reach(trainer.global_step):
            keys = self._keys(batch)
            self._batch = self._block.enter_context(self.recording.batch(keys))
            share = 1 / (len(keys) * trainer.accumulate_grad_batches)
            self._batch.weights = torch.full((len(keys),), share, dtype=torch.float64)

    def on_before_backward(
        self, trainer: Trainer, pl_module: LightningModule, loss: Tensor
    ) -> None:
        """Takes the samples' losses, if there are any."""
        losses = getattr(pl_module, "sample_losses", None)
        if self._batch is not None and losses is not None:
            self._batch.losses = losses

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """After the backward pass, before clipping and the optimizer's step."""
        self._batch = None
        self._block.close()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Commits the rest, and that the stage is trained."""
        assert self.recording is not None
        try:
            self.recording.finish()
        finally:
            self.recording.close()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Leaves model and optimizer without hooks."""
        if self.recording is not None:
            self._block.close()
            self.recording.close()


def _check_trainer(trainer: Trainer, module: LightningModule) -> None:
    """What a `Trainer` may not be asked for.

    Raises:
        PlanError: it is.
    """
    if trainer.world_size > 1:
        raise PlanError("recording sees the samples of one process on one device; train on one")
    if not module.automatic_optimization or len(trainer.optimizers) != 1:
        raise PlanError(
            "recording follows one optimizer under automatic optimization; for another loop use `secateur.Recording`"
        )
    if trainer.precision == "16-mixed":
        raise PlanError(
            "`16-mixed` leaves steps out that the ledger counts; use `bf16-mixed` or full precision"
        )

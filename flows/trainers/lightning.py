"""A callback that records what Lightning's `Trainer` trains."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import ExitStack, suppress
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from secateur.errors import PlanError
from secateur.flows.trainers.lightning_losses import make_losses_of
from secateur.flows.trainers.recording import Recording
from secateur.influence.recorded_batch import RecordedBatch
from secateur.tasks.engine.progress import print_status
from secateur.tasks.external.recording_checks import Keys
from secateur.tasks.plan import Plan


class RecordingCallback(Callback):
    """Records a stage of a plan while a `Trainer` trains it by automatic optimization::

        callback = RecordingCallback("plan.yaml", stage=0, model="net")
        trainer = Trainer(max_steps=200, callbacks=[callback])
        trainer.fit(module, batches)  # each batch holds its samples' keys under "__key__"

    At the end it emits `secateur.stage.trained`, so that Prefect can prune the stage.

    A few samples are run alone by `training_step`, to check that contributions are those of the
    samples they are recorded for. It logs nothing then.

    If `training_step` leaves one loss per sample in `self.sample_losses`, with its graph, the
    samples' losses and weights are read from there. Otherwise all samples have the same weight, and
    their losses are not known.

    Args:
        plan: the plan, or the path of its file.
        stage: the stage's number.
        model: name of the submodule that is the plan's model. If empty, it is the module itself.
        keys: returns the samples' keys (or their row numbers in the run's sample list) of a batch.
        tolerance: relative distance allowed between the contributions' sum and the gradient. If
            None, it is 0.001, and 0.02 where anything is computed in half precision.
    """

    def __init__(
        self,
        plan: Plan | str | Path,
        stage: int,
        model: str = "",
        keys: Callable[[Any], Keys] = itemgetter("__key__"),
        tolerance: float | None = None,
    ) -> None:
        self._plan = plan
        self._stage = stage
        self._model = model
        self._keys = keys
        self._tolerance = tolerance
        # Holds the recording of one micro-batch open between two of the callback's methods.
        self._open_batch = ExitStack()
        self._batch: RecordedBatch | None = None
        self._is_recorded = False
        self.recording: Recording | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prepare the recording, because model and optimizer exist now."""
        _check_trainer(trainer, pl_module)
        steps = trainer.estimated_stepping_batches
        self.recording = Recording(
            self._plan,
            self._stage,
            pl_module.get_submodule(self._model),
            trainer.optimizers[0],
            steps=int(steps) if math.isfinite(steps) else None,
            by="lightning",
            tolerance=self._tolerance,
        )
        self.recording.prepare()
        trainer.should_stop |= self.recording.finished

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Begin to record a micro-batch, if the ledger does not have its step yet."""
        assert self.recording is not None
        self._is_recorded = self.recording.reach(trainer.global_step)
        if self._is_recorded:
            keys = self._keys(batch)
            losses_of = make_losses_of(trainer, pl_module, batch, batch_idx, len(keys))
            if losses_of is None and trainer.global_step == 0:
                print_status(
                    "no tensor of the batch has one entry per sample, so it is not checked that "
                    "contributions are those of the samples they are recorded for"
                )
            recording = self.recording.batch(keys, losses_of=losses_of)
            self._batch = self._open_batch.enter_context(recording)
            share = _loss_factor(trainer) / (len(keys) * trainer.accumulate_grad_batches)
            self._batch.weights = torch.full((len(keys),), share, dtype=torch.float64)

    def on_before_backward(
        self, trainer: Trainer, pl_module: LightningModule, loss: Tensor
    ) -> None:
        """Read the samples' losses, if the module leaves them."""
        losses = getattr(pl_module, "sample_losses", None)
        if self._batch is not None and losses is not None:
            self._batch.losses = losses

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End the micro-batch after its backward pass, before clipping and the optimizer's step."""
        self._batch = None
        self._open_batch.close()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Record a step that a GradScaler has left out, because the Trainer counts it."""
        assert self.recording is not None
        if self._is_recorded and self.recording.step < trainer.global_step:
            self.recording.skip_step()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Commit the remaining steps, and that the stage is trained."""
        assert self.recording is not None
        try:
            self.recording.finish()
        finally:
            self.recording.close()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Remove the hooks from model and optimizer."""
        if self.recording is not None:
            # With the exception, because what it interrupted is not to be checked.
            with suppress(type(exception)):
                self._open_batch.__exit__(type(exception), exception, exception.__traceback__)
            self.recording.close()


def _loss_factor(trainer: Trainer) -> float:
    """Return what `16-mixed` multiplies the loss by before the backward pass."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return 1.0 if scaler is None else float(scaler.get_scale())


def _check_trainer(trainer: Trainer, module: LightningModule) -> None:
    """Check that the trainer does nothing that cannot be recorded.

    Raises:
        PlanError: it does.
    """
    if trainer.world_size > 1:
        raise PlanError(
            "the Trainer runs on several devices, and recording sees the samples of one process on "
            "one device; set `devices=1`"
        )
    if not module.automatic_optimization or len(trainer.optimizers) != 1:
        raise PlanError(
            "recording follows one optimizer under automatic optimization; for another loop use "
            "`secateur.Recording`"
        )

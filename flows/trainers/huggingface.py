"""Room `flows.trainers`: a callback that records what Hugging Face's `Trainer` trains, and a collator that keeps the keys."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from secateur.errors import PlanError
from secateur.flows.trainers.recording import Recording
from secateur.influence.recorder import RecordedBatch
from secateur.tasks.external.recording import count_committed_steps
from secateur.tasks.plan import Plan

KEY = "__key__"
IGNORED = -100  # labels that the loss leaves out
AGREEMENT = 1e-2  # relative; a loss in half precision is rounded


class KeepKeys:
    """A data collator that takes `__key__`, the sample's key in its shard, out of every example, and puts the keys into the
    batch that another collator makes of the rest."""

    def __init__(self, collator: Callable[[list[Any]], Any]) -> None:
        self.collator = collator

    def __call__(self, examples: Sequence[dict[str, Any]]) -> Any:
        batch = self.collator(
            [{name: v for name, v in example.items() if name != KEY} for example in examples]
        )
        batch[KEY] = [example[KEY] for example in examples]
        return batch


class RecordingCallback(TrainerCallback):
    """Records a stage of a plan while `Trainer` trains it, and tells Prefect at the end::

        callback = RecordingCallback("plan.yaml", stage=0)
        trainer = Trainer(model, arguments, data_collator=KeepKeys(collator), train_dataset=..., callbacks=[callback])
        trainer.train(resume_from_checkpoint=callback.checkpoint(arguments.output_dir))

    It takes the keys out of the batch before the model sees them, and reads each sample's loss off the logits and labels;
    a loss that is not their cross-entropy is refused. Every committed segment asks the `Trainer` for a checkpoint too
    (unless `save_strategy` is `no`), so that both resume from the same step.

    Args:
        tolerance: relative distance allowed between the contributions' sum and the gradient; about 0.02 with `bf16`.
    """

    def __init__(self, plan: Plan | str | Path, stage: int, tolerance: float = 1e-3) -> None:
        self._plan, self._stage, self._tolerance = plan, stage, tolerance
        self._hooks = ExitStack()
        self._block = ExitStack()
        self._batch: RecordedBatch | None = None
        self._recorded = False

    def checkpoint(self, folder: str) -> str | None:
        """The last of the `Trainer`'s checkpoints in a folder from which the ledger can go on; None to begin anew."""
        done = count_committed_steps(self._plan, self._stage)
        found = [
            p
            for p in Path(folder).glob(f"{PREFIX_CHECKPOINT_DIR}-*")
            if p.name.rpartition("-")[2].isdigit()
        ]
        steps = {int(p.name.rpartition("-")[2]): p for p in found}
        fit = [step for step in steps if step <= done]
        return str(steps[max(fit)]) if fit else None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any
    ) -> None:
        """Begins once model and optimizer are made."""
        _check_arguments(args)
        model, optimizer = given["model"], given["optimizer"]
        self.recording = Recording(
            self._plan, self._stage, model, getattr(optimizer, "optimizer", optimizer), steps=state.max_steps,
            by="huggingface", tolerance=self._tolerance,
        )  # fmt: skip
        self._hooks.close()
        self.recording.prepare()
        self._hooks.callback(self.recording.close)
        self._hooks.callback(
            model.register_forward_pre_hook(self._before_forward, with_kwargs=True).remove
        )
        self._hooks.callback(
            model.register_forward_hook(self._after_forward, with_kwargs=True).remove
        )

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Decides whether the ledger wants this step."""
        self._recorded = self.recording.reach(state.global_step)

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """After the backward pass of all but the last micro-batch of a step."""
        self._close_block()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """After the last one's, and clipping."""
        self._close_block()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Saves where a segment was committed; a stage that is trained already is not trained on."""
        control.should_training_stop |= self.recording.finished
        if self._recorded and self.recording.at_boundary and args.save_strategy != "no":
            control.should_save = True

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Commits the rest, and that the stage is trained."""
        with self._hooks:
            self.recording.finish()

    def _before_forward(
        self, model: nn.Module, args: Any, kwargs: dict[str, Any]
    ) -> tuple[Any, dict[str, Any]]:
        keys = kwargs.get(KEY)
        rest = {name: value for name, value in kwargs.items() if name != KEY}
        if self._recorded and model.training and torch.is_grad_enabled():
            if keys is None:
                raise PlanError(
                    f"the batch carries no `{KEY}`; give every example its sample's key under that name, and the Trainer "
                    f"`data_collator=KeepKeys(...)`"
                )
            self._close_block()
            self._batch = self._block.enter_context(self.recording.batch(keys))
        return args, rest

    def _after_forward(
        self, model: nn.Module, args: Any, kwargs: dict[str, Any], output: Any
    ) -> None:
        if (batch := self._batch) is None:
            return
        loss, logits = (
            output.get(name) if isinstance(output, dict) else None for name in ("loss", "logits")
        )
        labels = kwargs.get("labels")
        if loss is None or logits is None or labels is None:
            raise PlanError(
                "the model gave no loss of its own; a Trainer with compute_loss_func or label smoothing is not known"
            )
        losses, counts = _losses(
            logits.detach(), labels, loss.detach(), kwargs.get("num_items_in_batch")
        )
        batch.losses = losses
        total = kwargs.get("num_items_in_batch") or counts.sum()

        def weigh(gradient: Tensor) -> None:
            batch.weights = (gradient * counts / total).double().cpu()

        loss.register_hook(weigh)

    def _close_block(self) -> None:
        self._batch = None
        self._block.close()


def _losses(logits: Tensor, labels: Tensor, loss: Tensor, total: Any) -> tuple[Tensor, Tensor]:
    """Each sample's mean loss and number of labels; labels may be those of the next position, as in causal models.

    Raises:
        PlanError: the loss is not the cross-entropy of logits and labels.
    """
    pairs = [(logits, labels)]
    if labels.dim() == 2 and logits.dim() == 3:
        pairs.insert(0, (logits[:, :-1], labels[:, 1:]))
    for scores, wanted in pairs:
        if scores.shape[:-1] != wanted.shape or wanted.is_floating_point():
            continue
        each = functional.cross_entropy(
            scores.flatten(0, -2).float(), wanted.flatten(), ignore_index=IGNORED, reduction="none"
        ).reshape(len(labels), -1)
        counts = (wanted.reshape(len(labels), -1) != IGNORED).sum(1)
        mean = each.sum() / (counts.sum() if total is None else total)
        if abs(float(mean) - float(loss)) <= AGREEMENT * abs(float(loss)) + 1e-6:
            return each.sum(1) / counts.clamp(min=1), counts
    raise PlanError(
        f"the model's loss ({float(loss):.4g}) is not the cross-entropy of its logits and labels, so the samples' own losses "
        f"are not known; record it in a loop of your own, with `secateur.Recording`"
    )


def _check_arguments(args: TrainingArguments) -> None:
    """What the `Trainer` may not be asked for.

    Raises:
        PlanError: it is.
    """
    if args.remove_unused_columns:
        raise PlanError(
            f"the Trainer would take `{KEY}` out of the examples; set `remove_unused_columns=False`"
        )
    if args.world_size > 1 or args.n_gpu > 1:
        raise PlanError("recording sees the samples of one process on one device; train on one")
    if args.fp16:
        raise PlanError(
            "`fp16` leaves steps out that the ledger counts; use `bf16` or full precision"
        )
    if args.torch_compile:
        raise PlanError(
            "a compiled model does not call its layers one by one; leave `torch_compile` off"
        )

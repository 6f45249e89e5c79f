"""A callback that records what Hugging Face's `Trainer` trains, and a collator that keeps keys."""

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
from secateur.influence.recorded_batch import RecordedBatch
from secateur.tasks.external.recording import count_committed_steps
from secateur.tasks.plan import Plan

KEY = "__key__"
IGNORE_INDEX = -100  # the label of positions that the loss leaves out
LOSS_TOLERANCE = 1e-2  # relative, because a loss in half precision is rounded


class KeepKeys:
    """A data collator that keeps the samples' keys.

    It takes `__key__`, the sample's key in its shard, out of every example. Another collator makes
    the batch of the rest, and the list of keys is added to the batch.
    """

    def __init__(self, collator: Callable[[list[Any]], Any]) -> None:
        self.collator = collator

    def __call__(self, examples: Sequence[dict[str, Any]]) -> Any:
        """Return the batch of some examples, with their keys under `__key__`."""
        batch = self.collator([_without_key(example) for example in examples])
        batch[KEY] = [example[KEY] for example in examples]
        return batch


# `transformers` is not followed by mypy, so its classes have type Any.
class RecordingCallback(TrainerCallback):  # type: ignore[misc]
    """Records a stage of a plan while `Trainer` trains it::

        callback = RecordingCallback("plan.yaml", stage=0)
        trainer = Trainer(
            model,
            arguments,
            data_collator=KeepKeys(collator),
            train_dataset=examples,
            callbacks=[callback],
        )
        trainer.train(resume_from_checkpoint=callback.checkpoint(arguments.output_dir))

    At the end it emits `secateur.stage.trained`, so that Prefect can prune the stage.

    The callback takes the keys out of the batch before the model gets it. It computes each sample's
    loss from logits and labels, and refuses a loss that is not their cross-entropy. With every
    committed segment it also asks the `Trainer` for a checkpoint (unless `save_strategy` is `no`),
    so that both resume from the same step.

    Args:
        plan: the plan, or the path of its file.
        stage: the stage's number.
        tolerance: relative distance allowed between the contributions' sum and the gradient. About
            0.02 is needed with `bf16`.
    """

    def __init__(self, plan: Plan | str | Path, stage: int, tolerance: float = 1e-3) -> None:
        self._plan = plan
        self._stage = stage
        self._tolerance = tolerance
        self._hooks = ExitStack()
        # Holds the recording of one micro-batch open between two of the callback's methods.
        self._open_batch = ExitStack()
        self._batch: RecordedBatch | None = None
        self._is_recorded = False

    def checkpoint(self, folder: str) -> str | None:
        """Return the `Trainer`'s last checkpoint in a folder from which the ledger can continue.

        Returns:
            Its path, or None to begin from the start.
        """
        committed = count_committed_steps(self._plan, self._stage)
        paths = {}
        for path in Path(folder).glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
            step = path.name.rpartition("-")[2]
            if step.isdigit() and int(step) <= committed:
                paths[int(step)] = path
        return str(paths[max(paths)]) if paths else None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Prepare the recording, because model and optimizer exist now."""
        _check_arguments(args)
        model = kwargs["model"]
        self.recording = Recording(
            self._plan,
            self._stage,
            model,
            kwargs["optimizer"],
            steps=state.max_steps,
            by="huggingface",
            tolerance=self._tolerance,
        )
        self._hooks.close()
        self.recording.prepare()
        self._hooks.callback(self.recording.close)
        hook = model.register_forward_pre_hook(self._before_forward, with_kwargs=True)
        self._hooks.callback(hook.remove)
        hook = model.register_forward_hook(self._after_forward, with_kwargs=True)
        self._hooks.callback(hook.remove)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Decide whether the step is recorded: it is not if the ledger has it already."""
        self._is_recorded = self.recording.reach(state.global_step)

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """End a micro-batch after its backward pass, for all but the last of a step."""
        self._end_batch()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """End the last micro-batch of a step, after clipping."""
        self._end_batch()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Ask for a checkpoint if a segment was committed, and stop if the stage is finished."""
        control.should_training_stop |= self.recording.finished
        if self._is_recorded and self.recording.at_boundary and args.save_strategy != "no":
            control.should_save = True

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Commit the remaining steps, and that the stage is trained."""
        with self._hooks:
            self.recording.finish()

    def _before_forward(
        self, model: nn.Module, args: Any, kwargs: dict[str, Any]
    ) -> tuple[Any, dict[str, Any]]:
        # Evaluation within the training loop runs the same model, and is not recorded.
        if self._is_recorded and model.training and torch.is_grad_enabled():
            if kwargs.get(KEY) is None:
                raise PlanError(
                    f"the batch has no `{KEY}`; give every example its sample's key under that "
                    f"name, and the Trainer `data_collator=KeepKeys(...)`"
                )
            self._end_batch()
            self._batch = self._open_batch.enter_context(self.recording.batch(kwargs[KEY]))
        return args, _without_key(kwargs)

    def _after_forward(
        self, model: nn.Module, args: Any, kwargs: dict[str, Any], output: Any
    ) -> None:
        batch = self._batch
        if batch is None:
            return
        outputs = output if isinstance(output, dict) else {}
        loss = outputs.get("loss")
        logits = outputs.get("logits")
        labels = kwargs.get("labels")
        if loss is None or logits is None or labels is None:
            raise PlanError(
                "the model did not compute the loss itself, so the samples' losses are not known; "
                "do not use compute_loss_func or label smoothing, or record with "
                "`secateur.Recording` in your own loop"
            )
        items = kwargs.get("num_items_in_batch")
        losses, label_counts = _sample_losses(logits.detach(), labels, loss.detach(), items)
        batch.losses = losses
        total = items or label_counts.sum()

        def set_weights(gradient: Tensor) -> None:
            # The gradient of the loss is the factor that the Trainer scales the loss by.
            batch.weights = (gradient * label_counts / total).double().cpu()

        loss.register_hook(set_weights)

    def _end_batch(self) -> None:
        self._batch = None
        self._open_batch.close()


def _without_key(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name != KEY}


def _sample_losses(
    logits: Tensor, labels: Tensor, loss: Tensor, items: Any
) -> tuple[Tensor, Tensor]:
    """Each sample's mean loss and number of labels.

    Labels may be those of the next position, as in causal models.

    Args:
        loss: the model's loss of the batch.
        items: the number of labels that the `Trainer` divides by, or None for those of the batch.

    Raises:
        PlanError: the loss is not the cross-entropy of logits and labels.
    """
    pairs = [(logits, labels)]
    if labels.dim() == 2 and logits.dim() == 3:
        pairs.insert(0, (logits[:, :-1], labels[:, 1:]))
    for scores, classes in pairs:
        if scores.shape[:-1] != classes.shape or classes.is_floating_point():
            continue
        losses = _label_losses(scores, classes)
        counts = (classes.reshape(len(labels), -1) != IGNORE_INDEX).sum(1)
        mean = losses.sum() / (counts.sum() if items is None else items)
        if abs(float(mean) - float(loss)) <= LOSS_TOLERANCE * abs(float(loss)) + 1e-6:
            return losses.sum(1) / counts.clamp(min=1), counts
    raise PlanError(
        f"the model's loss ({float(loss):.4g}) is not the cross-entropy of its logits and labels, "
        f"so the samples' losses are not known; record it in your own loop with "
        f"`secateur.Recording`"
    )


def _label_losses(scores: Tensor, classes: Tensor) -> Tensor:
    """The cross-entropy of each label, with one row per sample. Ignored labels have 0."""
    losses = functional.cross_entropy(
        scores.flatten(0, -2).float(),
        classes.flatten(),
        ignore_index=IGNORE_INDEX,
        reduction="none",
    )
    return losses.reshape(len(classes), -1)


def _check_arguments(args: TrainingArguments) -> None:
    """Check that the `Trainer` does nothing that cannot be recorded.

    Raises:
        PlanError: it does.
    """
    if args.remove_unused_columns:
        raise PlanError(
            f"the Trainer would remove `{KEY}` from the examples; set `remove_unused_columns=False`"
        )
    if args.world_size > 1 or args.n_gpu > 1:
        raise PlanError(
            "the Trainer runs on several devices, and recording sees the samples of one process on "
            "one device; use one process and one GPU (`CUDA_VISIBLE_DEVICES`)"
        )
    if args.fp16:
        raise PlanError("`fp16` skips steps that the ledger counts; use `bf16` or full precision")
    if args.torch_compile:
        raise PlanError(
            "a compiled model does not call its layers one by one; set `torch_compile=False`"
        )

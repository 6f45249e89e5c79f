"""A callback that records what Hugging Face's `Trainer`, or TRL's `SFTTrainer`, trains."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from secateur.errors import PlanError
from secateur.flows.trainers.keep_keys import ADDED, DOCUMENTS, KEY, LABELS, LENGTHS, KeepKeys
from secateur.flows.trainers.recorded_forward import RecordedForward
from secateur.flows.trainers.recording import Recording
from secateur.flows.trainers.sample_losses import LossRule, fused_outputs
from secateur.influence.recorded_batch import RecordedBatch
from secateur.tasks.external.stage_files import count_committed_steps
from secateur.tasks.plan import Plan

__all__ = ["KeepKeys", "RecordingCallback"]


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

    Under `torchrun` or `accelerate launch` each process records the samples that it trains on.

    The callback takes the keys out of the batch before the model gets it. It computes each sample's
    loss from logits and labels, label smoothing included, and refuses a loss that is not their
    cross-entropy. Where several samples share a row, each is recorded by itself. TRL's fused head
    is replaced by the model's own if it is trained, because it is captured there. With every
    committed segment it also asks the `Trainer` for a checkpoint (unless `save_strategy` is `no`),
    so that both resume from the same step.

    Args:
        plan: the plan, or the path of its file.
        stage: the stage's number.
        tolerance: relative distance allowed between the contributions' sum and the gradient. If
            None, it is 0.001, and 0.02 where anything is computed in half precision.
    """

    def __init__(self, plan: Plan | str | Path, stage: int, tolerance: float | None = None) -> None:
        self._plan = plan
        self._stage = stage
        self._tolerance = tolerance
        self._hooks = ExitStack()
        # Holds the recording of one micro-batch open between two of the callback's methods.
        self._open_batch = ExitStack()
        self._batch: RecordedBatch | None = None
        self._forward: RecordedForward | None = None
        self._rule: LossRule | None = None
        self._replaces_head = False
        # Holds compiled models uncompiled during a recorded step.
        self._uncompiled = ExitStack()
        self._is_new = False
        self._is_recorded = False
        self._is_alone = False
        self._drops_columns = False

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

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Keep the samples' keys, which the Trainer would remove with columns it does not use."""
        self._drops_columns = args.remove_unused_columns
        args.remove_unused_columns = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Prepare the recording, because model and optimizer exist now."""
        _check_arguments(args)
        self._model = model = kwargs["model"]
        self._smoothing = args.label_smoothing_factor
        self._is_compiled = args.torch_compile or any(map(_has_compiled_call, model.modules()))
        collator = _find_collator(kwargs.get("train_dataloader"))
        if collator is not None and self._drops_columns:
            collator.columns = _model_columns(model, args)
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
        self._uncompiled.close()
        self.recording.prepare()
        self._hooks.callback(self.recording.close)
        # A compiled model must not be compiled with them, or each batch's keys would be constants.
        before, after = map(torch.compiler.disable, (self._before_forward, self._after_forward))
        hook = model.register_forward_pre_hook(before, with_kwargs=True)
        self._hooks.callback(hook.remove)
        hook = model.register_forward_hook(after, with_kwargs=True)
        self._hooks.callback(hook.remove)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Decide whether the step is recorded. It is not if the ledger has it already."""
        self._is_new = self.recording.reach(state.global_step)
        self._is_recorded = self._is_new and self.recording.is_next_recorded
        if self._is_recorded and self._is_compiled:
            self._uncompiled.enter_context(_uncompiled())

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
        self._uncompiled.close()
        if self._is_new and self.recording.step < state.global_step:
            self.recording.skip_step()  # a GradScaler has left it out, and the Trainer counts it
        control.should_training_stop |= self.recording.finished
        if self._is_new and self.recording.at_boundary and args.save_strategy != "no":
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
        inputs = {name: value for name, value in kwargs.items() if name not in ADDED}
        # Evaluation within the training loop runs the same model, and is not recorded. Neither are
        # samples that are run alone.
        recorded = self._is_recorded and model.training and torch.is_grad_enabled()
        if not recorded or self._is_alone:
            return args, inputs
        keys = kwargs.get(KEY)
        labels = kwargs.get("labels", kwargs.get(LABELS))
        if keys is None:
            raise PlanError(
                f"the batch has no `{KEY}`; give every example its sample's key under that name, "
                f"and the Trainer `data_collator=KeepKeys(...)`"
            )
        if labels is None:
            raise PlanError("the batch has no `labels`, so its samples' losses are not known")
        self._end_batch()
        own = {name: value for name, value in inputs.items() if name != "labels"}
        documents = kwargs.get(DOCUMENTS)
        forward = RecordedForward(
            model, own, labels, documents, len(keys), self._smoothing, self._run_alone, self._rule
        )
        if self._rule is None:
            self._rule = forward.rule = forward.find_rule()
        recording = self.recording.batch(keys, losses_of=forward.losses_of, documents=documents)
        self._batch = self._open_batch.enter_context(recording)
        # Set last, because finding where parameters are read runs the model.
        self._forward = forward
        self._replaces_head = bool(inputs.get("fused_lm_head")) and _trains_head(model)
        return args, own | {"fused_lm_head": False} if self._replaces_head else inputs

    def _after_forward(
        self, model: nn.Module, args: Any, kwargs: dict[str, Any], output: Any
    ) -> Any:
        if self._batch is None or self._forward is None or not torch.is_grad_enabled():
            return None
        forward, self._forward = self._forward, None
        if self._replaces_head:
            output = fused_outputs(output, forward.labels)
        forward.read(output, self._batch)
        return output

    def _run_alone(self, **inputs: Any) -> Any:
        """Run the model on samples that are not recorded."""
        self._is_alone = True
        try:
            return self._model(**inputs)
        finally:
            self._is_alone = False

    def _end_batch(self) -> None:
        self._batch = None
        self._open_batch.close()


@contextmanager
def _uncompiled() -> Iterator[None]:
    """Run compiled models uncompiled within the block, because they do not call their layers."""
    # If training is interrupted, the block ends with the callback that has entered it.
    with torch.compiler.set_stance("force_eager"):
        yield


def _has_compiled_call(module: nn.Module) -> bool:
    return hasattr(module, "_orig_mod") or module._compiled_call_impl is not None


def _trains_head(model: Any) -> bool:
    """Whether the weight of the layer that gives the logits is trained."""
    return any(p.requires_grad for p in model.get_output_embeddings().parameters())


def _find_collator(loader: Any) -> KeepKeys | None:
    """Return the KeepKeys of a data loader, which may be wrapped."""
    collator = getattr(loader, "collate_fn", None)
    while collator is not None and not isinstance(collator, KeepKeys):
        collator = getattr(collator, "data_collator", None)
    return collator


def _model_columns(model: Any, args: TrainingArguments) -> set[str]:
    """Return the columns of an example that a model's batch is made of."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    named = set(inspect.signature(inner.forward).parameters)
    return named | {"label", "label_ids", "labels", LENGTHS, *(args.label_names or [])}


def _check_arguments(args: TrainingArguments) -> None:
    """Check that the `Trainer` does nothing that cannot be recorded.

    Raises:
        PlanError: it does.
    """
    if args.remove_unused_columns:
        raise PlanError(
            f"the Trainer has removed `{KEY}` from the examples; give the callback to the Trainer "
            f"when it is made, or set `remove_unused_columns=False`"
        )
    if args.n_gpu > 1:
        raise PlanError(
            "the Trainer copies the model to several GPUs in one process, where samples cannot be "
            "told apart; start one process per GPU with `torchrun`, or use one GPU "
            "(`CUDA_VISIBLE_DEVICES`)"
        )
    if args.fsdp or args.deepspeed:
        raise PlanError(
            "recording follows the Trainer's processes with DDP only; leave out `fsdp` and "
            "`deepspeed`, or record FSDP2 with `secateur.Recording` in your own loop"
        )

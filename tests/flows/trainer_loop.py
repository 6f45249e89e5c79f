"""A user's script with `Trainer`: `[torchrun -m] tests.flows.trainer_loop PLAN BATCH PARTS`."""

from __future__ import annotations

import sys

from transformers import Trainer, TrainingArguments

from secateur.flows.trainers.huggingface import KeepKeys, RecordingCallback
from secateur.tasks.plan.plan_file import read_plan
from secateur.tasks.run import Run
from tests.flows import gpt

if __name__ == "__main__":
    path, size, parts = sys.argv[1:]
    plan = read_plan(path)
    callback = RecordingCallback(plan, 0)
    arguments = TrainingArguments(
        f"{plan.root}/{plan.run}-trainer",
        per_device_train_batch_size=int(size),
        gradient_accumulation_steps=int(parts),
        max_steps=5,
        learning_rate=0.01,
        weight_decay=0.1,
        remove_unused_columns=False,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
        logging_strategy="no",
    )
    Trainer(
        Run.of_plan(plan).model(),
        arguments,
        data_collator=KeepKeys(gpt.collate),
        train_dataset=gpt.make_examples(),
        callbacks=[callback],
    ).train()

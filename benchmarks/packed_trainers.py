"""Recorded trainings of a small Llama with LoRA, with documents in rows of their own or packed."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader
from transformers import (
    DataCollatorWithFlattening,
    PreTrainedTokenizerFast,
    PrinterCallback,
    Trainer,
    TrainingArguments,
)
from trl.data_utils import pack_dataset
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from examples.shards import write_shards
from examples.text.make_shards import read_domains
from secateur.flows.trainers.huggingface import KeepKeys, RecordingCallback
from secateur.tasks.plan import Plan
from secateur.tasks.run import Run

LENGTHS = (20, 121)  # of documents, in bytes; the second is excluded
ROW = 256  # tokens of a packed row, at most
ROWS_PER_STEP = 4
TARGET = 48  # documents
EOS, PAD = 256, 257  # after the bytes
LEARNING_RATE = 2e-3
SETTINGS: dict[str, dict[str, bool]] = {
    "float32": {"bf16": False, "gradient_checkpointing": False},
    "bf16": {"bf16": True, "gradient_checkpointing": False},
    "checkpointing": {"bf16": False, "gradient_checkpointing": True},
}
Document = dict[str, Any]  # `__key__` and `input_ids`
Batches = list[list[int]]  # positions in the data set, by step


def make_documents(folder: Path, count: int, seed: int) -> list[Document]:
    """Write shards of documents of three domains and of a target (the manual), and return them."""
    rng = np.random.default_rng(seed)
    texts: dict[str, list[bytes]] = {"train": [], "target": []}
    for domain, text in read_domains().items():
        ends = rng.integers(*LENGTHS, size=len(text) // LENGTHS[0]).cumsum()
        ends = ends[ends < len(text)]
        pieces = [text[a:b] for a, b in itertools.pairwise(ends)]
        # Two equal documents could not be told apart by their tokens.
        chosen = [pieces[i] for i in rng.permutation(len(pieces))]
        chosen = list(dict.fromkeys(chosen))
        texts["train"] += chosen[: count // 3]
        if domain == "manual":
            texts["target"] += chosen[count // 3 : count // 3 + TARGET]
    for name, own in texts.items():
        samples = [{"__key__": f"{name}-{n:05d}", "txt": text} for n, text in enumerate(own)]
        write_shards(f"{folder}/{name}-%06d.tar", samples, 1)
    return [
        {"__key__": f"train-{n:05d}", "input_ids": list(text)}
        for n, text in enumerate(texts["train"])
    ]


def make_plan(folder: Path, run: str, seed: int, steps: int) -> Plan:
    """Return the plan that all trainings of a seed share, except for the run's name."""
    llama = {
        "model_type": "llama",
        "vocab_size": PAD + 1,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": ROW,
        "pad_token_id": PAD,
        "eos_token_id": EOS,
    }
    lora = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"]}
    plan = {
        "run": run,
        "root": f"{folder}/runs",
        "seed": seed,
        "threads": 1,
        "model": {
            "factory": "secateur.huggingface:build_model",
            "args": {"config": llama, "lora": lora},
        },
        "task": {
            "factory": "secateur.text:NextToken",
            "args": {"length": ROW},
            "reduction": "token_mean",
        },
        "data": {"shards": f"{folder}/train-000000.tar"},
        "targets": {"manual": {"shards": f"{folder}/target-000000.tar"}},
        "optimizer": {"kind": "adamw", "lr": LEARNING_RATE},
        "stages": [{"steps": steps, "batch_size": 16}],
        "segment_steps": 8,
        "basis": {"kind": "coordinates", "numbers": 512},
        "score": {"horizon": "stage", "aggregate": "mean", "estimate": "embedding"},
    }
    return Plan.model_validate(plan)


def find_steps(documents: list[Document], seed: int) -> tuple[Batches, Batches]:
    """Return the rows of each step, in TRL's packing of the documents, and the documents in them.

    Rows are in random order, because TRL sorts documents by their length.
    """
    place = {tuple(one["input_ids"]): number for number, one in enumerate(documents)}
    tokens = Dataset.from_list([{"input_ids": one["input_ids"]} for one in documents])
    packed = pack_dataset(tokens, ROW, "bfd")
    rows = []
    for row in packed:
        ends = np.cumsum(row["seq_lengths"])
        parts = itertools.pairwise([0, *ends])
        rows.append([place[tuple(row["input_ids"][start:end])] for start, end in parts])
    order = np.random.default_rng(seed).permutation(len(rows)).tolist()
    steps = range(0, len(rows) - ROWS_PER_STEP + 1, ROWS_PER_STEP)
    by_row = [order[step : step + ROWS_PER_STEP] for step in steps]
    return by_row, [[one for row in step for one in rows[row]] for step in by_row]


def train(
    plan: Plan, documents: list[Document], batches: Batches, kind: str, packed: bool, setting: str
) -> Run:
    """Train and record a stage, under `Trainer` or `SFTTrainer`.

    Args:
        plan: the plan.
        documents: all documents.
        batches: of each step, the documents; the rows if `SFTTrainer` packs them.
        kind: `Trainer` or `SFTTrainer`.
        packed: whether documents share rows.
        setting: one of `SETTINGS`.
    """
    callback = RecordingCallback(plan, 0)
    arguments: dict[str, Any] = {
        "output_dir": f"{plan.root}/{plan.run}-output",
        "max_steps": len(batches),
        "learning_rate": LEARNING_RATE,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "logging_strategy": "no",
        "save_strategy": "no",
        **SETTINGS[setting],
    }
    data = Dataset.from_list(documents)
    model = Run.of_plan(plan).model()
    if kind == "Trainer":
        collate = DataCollatorWithFlattening() if packed else _pad
        trainer = Trainer(
            model,
            TrainingArguments(**arguments),
            train_dataset=data,
            data_collator=KeepKeys(collate),
            callbacks=[callback],
        )
    else:
        trainer = SFTTrainer(
            model,
            args=SFTConfig(**arguments, packing=packed, max_length=ROW),
            train_dataset=data,
            processing_class=_tokenizer(),
            callbacks=[callback],
        )
        collate = trainer.data_collator if packed else _pad
        trainer.data_collator = KeepKeys(collate, documents, ROW)
    loader = DataLoader(
        trainer.train_dataset, batch_sampler=batches, collate_fn=trainer.data_collator
    )
    trainer.get_train_dataloader = lambda: trainer.accelerator.prepare(loader)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return callback.recording.run


def _pad(examples: list[Document]) -> dict[str, Tensor]:
    """Return a batch of documents in rows of their own. A first token is no label, as if packed."""
    ids = [torch.tensor(example["input_ids"]) for example in examples]
    padded = pad_sequence(ids, batch_first=True)
    mask = torch.arange(padded.shape[1]) < torch.tensor([[len(one)] for one in ids])
    labels = padded.where(mask, -100)
    labels[:, 0] = -100
    return {"input_ids": padded, "attention_mask": mask.long(), "labels": labels}


def _tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer for SFTTrainer, which the tokens of the documents do not need."""
    words = Tokenizer(models.WordLevel({"<eos>": EOS, "<pad>": PAD}, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", pad_token="<pad>")

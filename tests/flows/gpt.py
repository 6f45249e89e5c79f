"""A small GPT-2 from a configuration, and texts of different lengths for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence
from transformers import GPT2Config, GPT2LMHeadModel

from examples.shards import write_shards
from secateur.tasks.plan import Plan

TEXTS = [f"{n} green bottles, {'hanging ' * (n % 3)}wall" for n in range(40)]


def gpt2(dropout: float = 0.0) -> nn.Module:
    """Make a GPT-2 of one layer of width 8."""
    config = GPT2Config(
        vocab_size=128,
        n_positions=64,
        n_embd=8,
        n_layer=1,
        n_head=2,
        resid_pdrop=dropout,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
    )
    return GPT2LMHeadModel(config)


def collate(examples: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Pad texts to the longest. Padding is not a label."""
    ids = [torch.tensor(example["input_ids"]) for example in examples]
    padded = pad_sequence(ids, batch_first=True)
    lengths = torch.tensor([[len(text)] for text in ids])
    mask = torch.arange(padded.shape[1]) < lengths
    return {"input_ids": padded, "attention_mask": mask.long(), "labels": padded.where(mask, -100)}


class NextToken:
    """The mean cross-entropy of the next bytes, for each text."""

    def collate(self, samples: list[dict[str, Any]]) -> dict[str, Tensor]:
        return collate([{"input_ids": list(sample["txt"])} for sample in samples])

    def losses(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        output = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        logits = output.logits[:, :-1].transpose(1, 2)
        losses = functional.cross_entropy(logits, batch["labels"][:, 1:], reduction="none")
        return losses.sum(1) / self.sizes(batch)

    def sizes(self, batch: dict[str, Tensor]) -> Tensor:
        return (batch["labels"][:, 1:] != -100).sum(1)


def make_samples(texts: list[str] = TEXTS) -> list[dict[str, Any]]:
    """Return texts as samples of shards."""
    return [{"__key__": f"text-{n:03d}", "txt": text.encode()} for n, text in enumerate(texts)]


def make_examples() -> list[dict[str, Any]]:
    """Return the texts as a `Trainer` gets them, each with its key."""
    samples = make_samples()
    return [{"__key__": s["__key__"], "input_ids": list(s["txt"])} for s in samples]


def make_data(folder: Path) -> None:
    """Write two shards of texts, and a target of six texts in capitals."""
    write_shards(f"{folder}/train-%d.tar", make_samples(), 2)
    capitals = make_samples([text.upper() for text in TEXTS[:6]])
    write_shards(f"{folder}/target-%d.tar", capitals, 1)


def make_plan(folder: Path, **changes: Any) -> Plan:
    """Return a plan of one stage, with some of its keys replaced."""
    values = {
        "run": "gpt",
        "root": f"{folder}/runs",
        "threads": 1,
        "model": {"factory": "tests.flows.gpt:gpt2"},
        "task": {"factory": "tests.flows.gpt:NextToken", "reduction": "token_mean"},
        "data": {"shards": f"{folder}/train-{{0..1}}.tar"},
        "targets": {"loud": {"shards": f"{folder}/target-0.tar"}},
        "optimizer": {"kind": "adamw", "lr": 0.01},
        "stages": [{"steps": 5, "batch_size": 8, "prune": {"policy": "top", "keep": 0.5}}],
        "segment_steps": 1,
        "basis": {"kind": "coordinates", "numbers": None, "fit_steps": 1},
    }
    return Plan.model_validate(values | changes)

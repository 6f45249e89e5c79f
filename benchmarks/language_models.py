"""Small language models and a learning task over random tokens, for measurements of memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from examples.shards import write_shards

POSITIONS = 128


def llama() -> nn.Module:
    """Return a Llama of 4 layers of 256, with a vocabulary of 32,000."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32_000,
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=4,
        num_attention_heads=4,
        use_cache=False,
    )
    return LlamaForCausalLM(config)


def pythia(hidden: int = 128, layers: int = 6, heads: int = 4) -> nn.Module:
    """Return a GPT-NeoX of Pythia's shape; by default that of Pythia-14M."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    config = GPTNeoXConfig(
        vocab_size=50_304,
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        use_cache=False,
        attention_dropout=0.0,
        hidden_dropout=0.0,
    )
    return GPTNeoXForCausalLM(config)


class Tokens:
    """Predicts each next token of samples that hold tokens as 16-bit numbers (`.tok`)."""

    def collate(self, samples: list[dict[str, Any]]) -> dict[str, Tensor]:
        """Return `ids`."""
        ids = np.stack([np.frombuffer(sample["tok"], np.uint16) for sample in samples])
        return {"ids": torch.from_numpy(ids.astype(np.int64))}

    def losses(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """Return the mean cross-entropy of each sample."""
        logits = model(input_ids=batch["ids"]).logits[:, :-1]
        each = functional.cross_entropy(
            logits.transpose(1, 2), batch["ids"][:, 1:], reduction="none"
        )
        return each.mean(1)


def write_tokens(folder: Path, vocabulary: int, samples: int, positions: int = POSITIONS) -> None:
    """Write shards of training samples, and a target of 24 samples."""
    rng = np.random.default_rng(0)
    for name, count in (("train", samples), ("target", 24)):
        tokens = rng.integers(vocabulary, size=(count, positions), dtype=np.uint16)
        rows = [
            {"__key__": f"{name}-{number:06d}", "tok": row.tobytes()}
            for number, row in enumerate(tokens)
        ]
        write_shards(f"{folder}/{name}-%06d.tar", rows, 1)

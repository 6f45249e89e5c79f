"""A plain PyTorch loop trains both stages of a plan; between them Prefect prunes. `python -m examples.outside.train`.

Killed, it carries on at the last whole segment when it is started again.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import webdataset
from torch import Tensor
from torch.nn import functional

from examples.images.model import mlp
from examples.images.task import Digits
from secateur.flows.trainers import Recording, wait_for_shards

PLAN = "examples/outside/plan.yaml"
STEPS = 240


def batches(shards: str | list[str], stage: int) -> Iterator[tuple[list[str], Tensor, Tensor]]:
    """Keys, images and labels of each step, in an order that the stage determines, so that a step can be taken again."""
    samples = list(webdataset.WebDataset(shards, shardshuffle=False))
    generator, collate = torch.Generator().manual_seed(stage), Digits().collate
    for _ in range(STEPS):
        chosen = [samples[n] for n in torch.randint(len(samples), (32,), generator=generator)]
        tensors = collate(chosen)
        yield [sample["__key__"] for sample in chosen], tensors["images"], tensors["labels"]


def train(shards: str | list[str], stage: int) -> str:
    """Trains a stage; the run's folder."""
    torch.manual_seed(0)
    model = mlp(hidden=128)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Recording(PLAN, stage, model, optimizer) as recording:
        for step, (keys, images, labels) in enumerate(batches(shards, stage)):
            if step < recording.step:  # committed before this process was started
                continue
            optimizer.zero_grad()
            with recording.batch(keys) as batch:
                losses = functional.cross_entropy(model(images), labels, reduction="none")
                batch.losses = losses
                losses.mean().backward()
            optimizer.step()
    return recording.run.url


def main() -> None:
    """Two stages, the second on what the first one's pruning kept."""
    run = train("data/images/train-{000000..000003}.tar", stage=0)
    shards = wait_for_shards(run, stage=0)
    print(f"stage 1 trains on {len(shards)} shards: {', '.join(shards)}", flush=True)
    train(shards, stage=1)


if __name__ == "__main__":
    main()

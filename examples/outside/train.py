"""Train both stages of a plan in a plain PyTorch loop, while Prefect prunes between them.

`python -m examples.outside.train`. If it is killed and started again, it continues after the last
whole segment.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import webdataset
from torch import Tensor
from torch.nn import functional

from examples.images.model import mlp
from examples.images.task import Digits
from secateur import Recording, wait_for_shards

PLAN = "examples/outside/plan.yaml"
STEPS = 240


def read_batches(shards: str | list[str], stage: int) -> Iterator[tuple[list[str], Tensor, Tensor]]:
    """Yield keys, images and labels of each step.

    The stage determines their order, so every step can be repeated.
    """
    samples = list(webdataset.WebDataset(shards, shardshuffle=False))
    generator = torch.Generator().manual_seed(stage)
    task = Digits()
    for _ in range(STEPS):
        chosen = [samples[n] for n in torch.randint(len(samples), (32,), generator=generator)]
        tensors = task.collate(chosen)
        yield [sample["__key__"] for sample in chosen], tensors["images"], tensors["labels"]


def train(shards: str | list[str], stage: int) -> str:
    """Train a stage, and return the run's folder."""
    torch.manual_seed(0)
    model = mlp(hidden=128)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Recording(PLAN, stage, model, optimizer) as recording:
        for step, (keys, images, labels) in enumerate(read_batches(shards, stage)):
            # These steps were committed before this process was started.
            if step < recording.step:
                continue
            optimizer.zero_grad()
            with recording.batch(keys) as batch:
                losses = functional.cross_entropy(model(images), labels, reduction="none")
                batch.losses = losses
                losses.mean().backward()
            optimizer.step()
    return recording.run.url


def main() -> None:
    """Train two stages, the second one on what pruning kept of the first one's samples."""
    run = train("data/images/train-{000000..000003}.tar", stage=0)
    shards = wait_for_shards(run, stage=0)
    print(f"stage 1 trains on {len(shards)} shards: {', '.join(shards)}", flush=True)
    train(shards, stage=1)


if __name__ == "__main__":
    main()

"""A user's own training loop, which trains a plan's first stage in one process or under torchrun.

    [torchrun --nproc-per-node N -m] tests.tasks.external.own_loop CASE ...

A case is `plan:wrapping:micro-batches:stop`: the plan's file, `plain`, `ddp` or `fsdp`, the number
of micro-batches of a step, and the step at which the loop is interrupted (-1 for never).
"""

from __future__ import annotations

import os
import sys
from contextlib import nullcontext, suppress

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from secateur import Recording, read_plan
from secateur.tasks.data.batches import BatchSchedule
from secateur.tasks.data.collate import collate
from secateur.tasks.data.samples import read_stage_samples
from secateur.tasks.plan import Plan
from secateur.tasks.run import Run
from secateur.tasks.training.optimizers import build_optimizer


class Interrupted(Exception):
    """The end of a loop that is interrupted."""


RANK = int(os.environ.get("RANK", 0))
SIZE = int(os.environ.get("WORLD_SIZE", 1))


def wrap(model: nn.Module, wrapping: str) -> nn.Module:
    if wrapping == "ddp":
        return DistributedDataParallel(model)
    if wrapping == "fsdp":
        for layer in model.children():
            fully_shard(layer)
        fully_shard(model)
    return model


def train(plan: Plan, wrapping: str, micro_batches: int, stop: int) -> None:
    run = Run.of_plan(plan)
    model = wrap(run.model(), wrapping)
    optimizer = build_optimizer(plan.optimizer, model)
    task = run.task()
    with suppress(Interrupted), Recording(plan, 0, model, optimizer) as recording:
        samples = read_stage_samples(run, 0)
        schedule = BatchSchedule(plan, 0, len(samples))
        for step in range(recording.step, schedule.steps):
            if step == stop:
                raise Interrupted
            optimizer.zero_grad()
            rows = schedule.batch(step)
            parts = list(rows.tensor_split(SIZE)[RANK].tensor_split(micro_batches))
            for part in parts:
                synchronizes = wrapping != "ddp" or part is parts[-1]
                waiting = nullcontext() if synchronizes else model.no_sync()  # type: ignore[operator]
                keys = samples.keys(part.tolist())
                with waiting, recording.batch(keys) as batch:
                    losses: Tensor = task.losses(model, collate(task, samples, part, "cpu"))
                    batch.losses = losses
                    (losses.sum() * SIZE / len(rows)).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()


if __name__ == "__main__":
    torch.set_num_threads(1)
    if SIZE > 1:
        dist.init_process_group("gloo")
    for case in sys.argv[1:]:
        path, wrapping, micro_batches, stop = case.split(":")
        train(read_plan(path), wrapping, int(micro_batches), int(stop))
    if SIZE > 1:
        dist.destroy_process_group()

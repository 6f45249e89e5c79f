"""The processes that train one model together: what they add up, collect and agree on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Ranks:
    """This process among those that train one model together. By default it is the only one.

    Every process must call the same methods in the same order. They work on copies in CPU memory
    over a gloo group of their own, so that they never meet the collectives of the training.

    Attributes:
        rank: this process's number, from 0.
        size: the number of processes.
        group: torch's process group; None if there is one process.
    """

    rank: int = 0
    size: int = 1
    group: Any = None

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes and commits."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """Return the sum of a tensor over the processes."""
        if self.size == 1:
            return values
        total = values.detach().cpu().clone()
        dist.all_reduce(total, group=self.group)
        return total.to(values.device)

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """Return every process's tensor, in the order of their numbers; only the first gets them.

        Args:
            tensor: may have another length in every process, but not another shape otherwise.

        Returns:
            The tensors on the CPU. An empty list in all processes but the first.
        """
        own = tensor.detach().cpu().contiguous()
        if self.size == 1:
            return [own]
        lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        dist.all_gather(lengths, torch.tensor([len(own)]), group=self.group)
        if not self.is_first:
            if own.numel():
                dist.send(own, group=self.group, group_dst=0)
            return []
        tensors = [own]
        for other, length in enumerate(lengths[1:], 1):
            received = own.new_empty(int(length), *own.shape[1:])
            if received.numel():
                dist.recv(received, group=self.group, group_src=other)
            tensors.append(received)
        return tensors

    def first_decides(self, answer: bool) -> bool:
        """Return the first process's answer, once it has got there."""
        if self.size == 1:
            return answer
        decision = torch.tensor([answer])
        dist.broadcast(decision, group=self.group, group_src=0)
        return bool(decision)

    @contextmanager
    def first_goes_first(self) -> Iterator[None]:
        """Let the other processes enter the block only once the first has left it."""
        if not self.is_first:
            self.first_decides(True)
        yield
        if self.is_first:
            self.first_decides(True)


def current_ranks() -> Ranks:
    """Return this process's place in torch's default process group, if there is one."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return Ranks()
    return Ranks(dist.get_rank(), dist.get_world_size(), _gloo_group(dist.group.WORLD))


@cache
def _gloo_group(_: Any) -> Any:
    """A gloo group over all processes, made once for each default group."""
    # The others may wait long for the first, which fits bases and writes to slow stores. Whatever
    # starts the processes ends those that wait for one that has failed.
    return dist.new_group(backend="gloo", timeout=timedelta(days=1))

"""Read samples and turn them into the learning task's tensors."""

from __future__ import annotations

from jaxtyping import Int
from torch import Tensor

from secateur.errors import PlanError
from secateur.storage.shards import Samples
from secateur.tasks.run import LearningTask

Tensors = dict[str, Tensor]


def collate(
    task: LearningTask, samples: Samples, rows: Int[Tensor, " batch"], device: str
) -> Tensors:
    """Read and decode some samples.

    Raises:
        PlanError: the task cannot decode a sample, which is named, or cannot collate the batch.
    """
    batch = samples.read(rows.tolist())
    try:
        return {name: tensor.to(device) for name, tensor in task.collate(batch).items()}
    except Exception as error:
        # One at a time, to find which sample it is.
        for sample in batch:
            try:
                task.collate([sample])
            except Exception as own:
                raise PlanError(
                    f"sample {sample['__key__']} of {samples.shard_url(sample['__key__'])} cannot "
                    f"be decoded by the task ({type(own).__name__}: {own}); repair or remove it"
                ) from own
        raise PlanError(
            f"the task cannot collate a batch ({type(error).__name__}: {error})"
        ) from error

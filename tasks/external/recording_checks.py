"""Checks of what another trainer's loop hands to a recording."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from secateur.errors import PlanError
from secateur.influence.recorded_batch import RecordedBatch
from secateur.storage.ledger import read_ledger
from secateur.storage.shards import Samples
from secateur.tasks.plan import Policy
from secateur.tasks.run import Run

Keys = Sequence[str] | Sequence[int] | Int[Tensor, " batch"]


def find_rows(
    keys: Keys, rows_by_key: Mapping[str, int], stage: int, step: int
) -> Int[Tensor, " batch"]:
    """Return the samples' rows in the stage's sample list.

    Args:
        keys: the samples' keys, or their rows.
        rows_by_key: of every sample of the stage.

    Raises:
        PlanError: the stage does not train on one of them.
    """
    listed: Iterable[str | int] = keys.tolist() if isinstance(keys, Tensor) else keys
    count = len(rows_by_key)
    rows = []
    for key in listed:
        row = key if isinstance(key, int) else rows_by_key.get(key, -1)
        if not 0 <= row < count:
            raise PlanError(
                f"sample {key} of step {step} is none of the {count} that stage {stage} trains on; "
                f"give keys as they are in the stage's shards"
            )
        rows.append(row)
    return torch.tensor(rows, dtype=torch.int64)


def check_losses(
    batch: RecordedBatch, policy: Policy | None, samples: Samples, stage: int, step: int
) -> None:
    """Check a recorded batch's losses.

    Raises:
        PlanError: the stage's policy needs losses and there are none, or one is not finite.
    """
    if batch.losses is None:
        if policy is not None and policy.needs_losses:
            raise PlanError(
                f"the plan prunes stage {stage} by {policy.policy}, and step {step} gave no "
                f"losses; set `batch.losses`"
            )
        return
    bad = (~batch.losses.isfinite()).nonzero().flatten().tolist()
    if bad:
        key = samples.keys([int(batch.samples[bad[0]])])[0]
        raise PlanError(
            f"the loss of sample {key} is {float(batch.losses[bad[0]]):g} at step {step} of stage "
            f"{stage}; lower the learning rate or look at the sample"
        )


def check_recorded(run: Run, stage: int) -> None:
    """Check that a stage has recorded uses in a window.

    Raises:
        PlanError: it has none.
    """
    segments = run.folder.stage(stage).segments()
    if not any((read_ledger(segment)[0]["windows"] >= 0).any() for segment in segments):
        raise PlanError(
            f"no step of stage {stage} of {run.url} was recorded in a window; take its steps "
            f"within the block, each with `recording.batch`"
        )

"""Some samples of a batch that is decoded already."""

from __future__ import annotations

import torch
from jaxtyping import Int
from torch import Tensor

from secateur.influence.capture.documents import Documents
from secateur.tasks.data.collate import Tensors

DOCUMENTS = "documents"  # in a batch whose rows hold several samples: the sample of each position
LABELS = "labels"
IGNORED_LABEL = -100  # of a position that the loss leaves out
POSITIONS = "position_ids"


def take_samples(batch: Tensors, places: Int[Tensor, " n"]) -> Tensors:
    """Return the samples at some places of a batch, in one row each."""
    if DOCUMENTS not in batch:
        return {name: tensor[places.to(tensor.device)] for name, tensor in batch.items()}
    numbers = batch[DOCUMENTS]
    places = places.to(numbers.device)
    packed = Documents.from_numbers(numbers, int(numbers.max()) + 1)
    real = packed.real[places]
    longest = int(real.sum(1).max())
    real = real[:, :longest]
    taken = {}
    for name, tensor in batch.items():
        rows = packed.gather(tensor, name)[places, :longest]
        taken[name] = torch.where(real, rows, IGNORED_LABEL if name == LABELS else 0)
    taken[DOCUMENTS] = torch.where(real, torch.arange(len(places)).to(places)[:, None], -1)
    if POSITIONS in batch:
        # The padding after a document is one of its own, which starts at 0.
        after = torch.arange(longest).to(places) - real.sum(1, keepdim=True)
        taken[POSITIONS] = torch.where(real, taken[POSITIONS], after)
    return taken

"""Read the results of `tasks/valuation`: embeddings, transition, target gradients and scores."""

from __future__ import annotations

from collections.abc import Iterable

import polars as pl
import torch
from jaxtyping import Float
from torch import Tensor

from secateur.influence.recursion import Transition
from secateur.storage.frames import read_frame
from secateur.storage.outputs import Output
from secateur.storage.tensors import read_tensors
from secateur.tasks.data.held_out import scoring_rows
from secateur.tasks.run import Run

DIRECTIONS = "directions.safetensors"
GRADIENTS, SQUARED_NORM = "gradients", "squared_norm"  # tensors in a target's file
REPLAY_FILE = "replay.safetensors"
REPLAY_SCORES = "scores"  # a tensor in that file
SCORES = "scores.parquet"
TRANSITION = "transition.safetensors"


def coupled_spans(run: Run) -> list[slice]:
    """Return the coefficients that the curvature couples: one slice per block, or one of all."""
    sizes = list(run.folder.basis.manifest.facts["blocks"].values())
    if run.plan.coupling == "full":
        return [slice(0, sum(sizes))]
    return [slice(sum(sizes[:i]), sum(sizes[: i + 1])) for i in range(len(sizes))]


def read_embeddings(embeddings: Output) -> list[Float[Tensor, "records width"]]:
    """Return a stage's embeddings, one memory-mapped tensor per segment.

    Their rows are in the order of `scores.parquet`.
    """
    segments = embeddings.manifest.facts["segments"]
    names = [segment_file(number) for number in range(segments)]
    return [read_tensors(embeddings, name)["embeddings"] for name in names]


def is_reduced(run: Run) -> bool:
    """Return whether embeddings have fewer numbers than the basis has coefficients."""
    coefficients = sum(run.folder.basis.manifest.facts["blocks"].values())
    return run.plan.components is not None and run.plan.components < coefficients


def read_transition(embeddings: Output) -> Transition:
    """Return a stage's transition, from its start to its end.

    If embeddings are reduced, it leads to their numbers and starts from theta. Otherwise it leads
    to theta alone if the optimizer is reset between stages, else to all slots.
    """
    return unpack_tensors(read_tensors(embeddings, TRANSITION))


def read_directions(run: Run, stage: int) -> Float[Tensor, "p directions"]:
    """Return the orthonormal directions that a stage's embeddings are reduced to."""
    return read_tensors(run.folder.stage(stage).components, DIRECTIONS)["directions"]


def read_scores(run: Run, stage: int) -> pl.DataFrame:
    """Return a stage's `scores.parquet`, one row per recorded use of a sample."""
    return read_frame(run.folder.stage(stage).scores, SCORES)


def read_replay_scores(
    run: Run, stage: int, number: int, names: Iterable[str] | None = None
) -> dict[str, Float[Tensor, " records"]]:
    """Return replay scores of a segment by name, in the order of its ledger.

    Args:
        number: of the segment.
        names: targets or questions; all targets if None.
    """
    return {
        name: _read_replayed_segment(run, stage, name, number) for name in names or run.plan.targets
    }


def read_replayed_target(run: Run, stage: int, target: str) -> Float[Tensor, " uses"]:
    """Return a target's replay scores of all uses, in the order of `scores.parquet`."""
    count = len(run.folder.stage(stage).segments())
    return torch.cat([_read_replayed_segment(run, stage, target, n) for n in range(count)])


def _read_replayed_segment(run: Run, stage: int, target: str, number: int) -> Tensor:
    replay = run.folder.stage(stage).replay(target, number)
    return read_tensors(replay, REPLAY_FILE)[REPLAY_SCORES]


def read_target_gradients(run: Run, stage: int, target: str) -> Float[Tensor, "samples p"]:
    """Return the stored loss gradients of a target's samples, in the run's basis."""
    return read_tensors(run.folder.stage(stage).targets, f"{target}.safetensors")[GRADIENTS]


def read_squared_norm(run: Run, stage: int, target: str) -> float | None:
    """Return the squared norm of a target's mean gradient in all parameters.

    None if an earlier version of this package wrote the stage, which did not store it.
    """
    tensors = read_tensors(run.folder.stage(stage).targets, f"{target}.safetensors")
    return float(tensors[SQUARED_NORM]) if SQUARED_NORM in tensors else None


def read_scoring_gradients(run: Run, stage: int, target: str) -> Float[Tensor, "samples p"]:
    """Return the stored gradients of those target samples that score training samples."""
    gradients = read_target_gradients(run, stage, target)
    return gradients[scoring_rows(run.plan, target, len(gradients))]


def segment_file(number: int) -> str:
    """Return the name of a segment's file within an output."""
    return f"seg-{number:05d}.safetensors"


def pack_tensors(tensors: list[Tensor]) -> dict[str, Tensor]:
    """Return a list of tensors under numbered names, as safetensors files hold them."""
    return {f"{number:05d}": tensor.contiguous() for number, tensor in enumerate(tensors)}


def unpack_tensors(tensors: dict[str, Tensor]) -> list[torch.Tensor]:
    """Return the list that `pack_tensors` was given."""
    return [tensors[name] for name in sorted(tensors)]

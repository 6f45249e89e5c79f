"""Read the results of `tasks/valuation`: embeddings, transition, target gradients and scores."""

from __future__ import annotations

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

AXES = "axes.safetensors"  # the principal components that the embeddings were reduced to
REPLAY_FILE = "replay.safetensors"
REPLAY_SCORES = "scores"  # a tensor in that file
SCORES = "scores.parquet"
TRANSITION = "transition.safetensors"


def coupled_spans(run: Run) -> list[slice]:
    """Return the coefficients that the curvature couples: one slice per block, or one of all."""
    sizes = list(run.folder.basis.manifest.facts["blocks"].values())
    if run.plan.curvature.coupling == "full":
        return [slice(0, sum(sizes))]
    return [slice(sum(sizes[:i]), sum(sizes[: i + 1])) for i in range(len(sizes))]


def read_embeddings(embeddings: Output) -> list[Float[Tensor, "records width"]]:
    """Return a stage's embeddings, one memory-mapped tensor per segment.

    Their rows are in the order of `scores.parquet`.
    """
    segments = embeddings.manifest.facts["segments"]
    names = [segment_file(number) for number in range(segments)]
    return [read_tensors(embeddings, name)["embeddings"] for name in names]


def read_transition(embeddings: Output) -> Transition:
    """Return a stage's transition, from its start to its end.

    It leads to theta alone if the optimizer is reset between stages, else to all slots.
    """
    return unpack_tensors(read_tensors(embeddings, TRANSITION))


def to_embedding_space(
    run: Run, stage: int, queries: Float[Tensor, "m width"]
) -> Float[Tensor, "m kept"]:
    """Project queries to the principal components that the stage's embeddings were reduced to.

    They are returned unchanged if the plan keeps every coefficient.
    """
    if run.plan.components is None:
        return queries
    axes = read_tensors(run.folder.stage(stage).embeddings, AXES)["axes"]
    return queries @ axes.to(queries.dtype)


def read_scores(run: Run, stage: int) -> pl.DataFrame:
    """Return a stage's `scores.parquet`, one row per recorded use of a sample."""
    return read_frame(run.folder.stage(stage).scores, SCORES)


def read_replay_scores(run: Run, stage: int, number: int) -> dict[str, Float[Tensor, " records"]]:
    """Return every target's replay scores of a segment, in the order of its ledger."""
    folder = run.folder.stage(stage)
    return {
        target: read_tensors(folder.replay(target, number), REPLAY_FILE)[REPLAY_SCORES]
        for target in run.plan.targets
    }


def read_target_gradients(run: Run, stage: int, target: str) -> Float[Tensor, "samples p"]:
    """Return the stored loss gradients of a target's samples, in the run's basis."""
    return read_tensors(run.folder.stage(stage).targets, f"{target}.safetensors")["gradients"]


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

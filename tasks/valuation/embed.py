"""Data value embeddings of a stage, in parts that are computed apart and then put together."""

from __future__ import annotations

from secateur.storage.attempt import Attempt
from secateur.storage.outputs import list_outputs
from secateur.tasks.results.training_results import end_checkpoint
from secateur.tasks.results.valuation_results import is_reduced
from secateur.tasks.run import Run
from secateur.tasks.valuation.embed_reduced import collect_groups, count_groups, embed_group
from secateur.tasks.valuation.embed_segments import carry_segments, embed_segment


def count_parts(run: Run, stage: int) -> int:
    """Return in how many parts a trained stage is embedded. They do not depend on one another.

    A part is a segment, or a group of the directions that embeddings are reduced to, which must
    have been chosen.
    """
    if is_reduced(run):
        return count_groups(run, stage)
    return len(run.folder.stage(stage).segments())


def embed_part(run: Run, stage: int, number: int) -> None:
    """Compute one part of a stage's embeddings."""
    if run.folder.stage(stage).embeddings.committed:
        return
    if is_reduced(run):
        embed_group(run, stage, number)
    else:
        embed_segment(run, stage, number)


def compose_stage(run: Run, stage: int) -> int:
    """Put a stage's embeddings together from their parts, which are removed afterwards.

    Returns:
        Number of embeddings.
    """
    folder = run.folder.stage(stage)

    def write(attempt: Attempt) -> None:
        end_checkpoint(run, stage)  # raises if the stage is not trained to its end
        compose = collect_groups if is_reduced(run) else carry_segments
        rows = compose(run, stage, attempt)
        attempt.facts.update(rows=rows, segments=len(folder.segments()))

    inputs = {"basis": run.folder.basis.fingerprint}
    manifest = folder.embeddings.write_once("embeddings", inputs, write)
    for part in list_outputs(folder.root.child("embedded")):
        part.remove()
    return int(manifest.facts["rows"])

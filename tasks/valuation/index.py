"""Room `tasks`: the FAISS index of a stage's embeddings."""

from __future__ import annotations

from secateur.storage.faiss_index import build_index, write_index
from secateur.tasks.engine.prefect_task import pipeline_task
from secateur.tasks.run.run import Run
from secateur.tasks.valuation.embed import stage_embeddings


@pipeline_task("index", makes=lambda run, stage: run.folder.stage(stage).index)
def index_stage(run_url: str, stage: int) -> int:
    """Indexes a stage's embeddings; ids are rows of its `scores.parquet`.

    Returns:
        Number of vectors.
    """
    run = Run.open(run_url)
    folder = run.folder.stage(stage)
    if not folder.index.committed:
        chunks = stage_embeddings(folder.embeddings)
        index = build_index(
            (c.numpy() for c in chunks if len(c)), run.plan.index, chunks[0].shape[1]
        )
        with folder.index.attempt(
            "index", {"embeddings": folder.embeddings.fingerprint}
        ) as attempt:
            write_index(attempt, index)
            attempt.facts.update(kind=run.plan.index, vectors=index.ntotal)
    return int(folder.index.manifest.facts["vectors"])

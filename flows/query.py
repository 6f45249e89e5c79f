"""Find the most influential samples, on demand."""

from __future__ import annotations

from prefect import flow

from secateur.flows import pipeline_tasks, run_artifacts
from secateur.tasks.valuation.query_answer import QueryAnswer


@flow(name="query", flow_run_name="query {run}")
def query(
    run: str,
    target: str | None = None,
    sample: str | None = None,
    top: int = 10,
    harmful: bool = False,
    stage: int | None = None,
    window: int | None = None,
    estimate: str = "embedding",
) -> QueryAnswer:
    """Find the samples that most lowered the loss of a target or a sample at the run's end.

    Args:
        run: path or URL of the run's folder.
        harmful: return the samples that most raised the loss.
        stage: search one stage only.
        window: search one window of each stage only.
        estimate: `embedding`, `pull_back` through the ledgers, or `replay` of the training.

    Returns:
        The samples under `hits`, and how far the answer agrees with replay if the plan measured
        that (`trust.questions`).
    """
    answer = pipeline_tasks.find_influential(
        run, target, sample, top, harmful, stage, window, estimate
    )
    run_artifacts.post_query(run, answer)
    return answer

"""Show when in training influence is high, and suggest windows, on demand."""

from __future__ import annotations

from prefect import flow

from secateur.flows import pipeline_tasks
from secateur.tasks.analysis.windows import WindowSuggestion


@flow(name="windows", flow_run_name="windows {run}")
def windows(run: str, stage: int | None = None, budget: float = 0.4) -> list[WindowSuggestion]:
    """Return the windows that the influence profiles of a run's stages suggest.

    Args:
        run: path or URL of the run's folder.
        stage: one stage only.
        budget: largest share of a stage's steps in its windows.
    """
    return pipeline_tasks.suggest_windows(run, stage, budget)

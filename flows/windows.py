"""Room `flows`: when in training influence is high, and the windows that suggests, on demand."""

from __future__ import annotations

from prefect import flow

from secateur.tasks.analysis.windows import WindowSuggestion, suggest_windows


@flow(name="windows", flow_run_name="windows {run}")
def windows(run: str, stage: int | None = None, budget: float = 0.4) -> list[WindowSuggestion]:
    """The windows that the influence profiles of a run's stages, or of one, suggest for a stage like it.

    Args:
        run: path or URL of the run's folder.
        budget: share of a stage's steps that its windows may hold at most.
    """
    return suggest_windows(run, stage, budget)

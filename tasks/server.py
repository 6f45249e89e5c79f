"""Room `tasks`: whether somebody watches."""

from __future__ import annotations

from prefect.settings import get_current_settings


def watched() -> bool:
    """Whether there is a Prefect server that stays: others wait for a run there, and look at its log and artifacts."""
    settings = get_current_settings()
    return settings.api.url is not None and settings.logging.to_api.enabled

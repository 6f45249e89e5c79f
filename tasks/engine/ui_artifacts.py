"""Post artifacts to Prefect's UI, under keys that stay the same from run to run."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable
from typing import Any

from secateur.tasks.engine.prefect_server import has_lasting_server
from secateur.tasks.engine.progress import print_status
from secateur.tasks.run import Run

# The date that the `dated` option of the curate flow puts after a run's name.
DATE = re.compile(r"[-_.]?\d{4}-\d{2}-\d{2}([-_.T]?\d{4,6})?$")
SECONDS_BETWEEN_UPDATES = 3.0


def artifact_key(run: Run, *parts: str) -> str:
    """Return an artifact's key, which holds the run's name without a date at its end.

    So the artifacts of every night's run have one history.
    """
    words = [DATE.sub("", run.plan.run), *parts]
    slugs = [re.sub(r"[^a-z0-9]+", "-", word.lower()).strip("-") for word in words]
    return "-".join(["secateur", *filter(None, slugs)])


def post_artifact(create: Callable[..., Any], **fields: Any) -> Any:
    """Create an artifact of the current Prefect run, if a lasting server keeps it.

    A run does not fail because the server refuses an artifact.

    Args:
        create: Prefect's function for the kind of artifact.

    Returns:
        What `create` returns, or None.
    """
    # Outside a Prefect run (a recording in a user's own loop) Prefect may not even be imported.
    if "prefect" not in sys.modules or not has_lasting_server():
        return None
    from prefect.context import FlowRunContext, TaskRunContext

    if TaskRunContext.get() is None and FlowRunContext.get() is None:
        return None
    try:
        return create(**fields)
    except Exception as error:
        key = fields.get("key", "")
        reason = type(error).__name__
        print_status(f"Prefect does not accept the artifact {key} ({reason}); the run continues")
        return None


class ProgressArtifact:
    """A progress bar in Prefect's UI, for long work."""

    def __init__(self, run: Run, what: str, total: int) -> None:
        self.total = max(1, total)
        self._last_update = time.monotonic()
        self._artifact = post_artifact(
            _create_progress,
            progress=0.0,
            key=artifact_key(run, what),
            description=f"{run.plan.run}: {what}",
        )

    def update(self, done: int) -> None:
        """Show how much is done, at most every few seconds."""
        now = time.monotonic()
        too_soon = done < self.total and now - self._last_update < SECONDS_BETWEEN_UPDATES
        if self._artifact is None or too_soon:
            return
        self._last_update = now
        share = 100.0 * done / self.total
        # If the server refuses an update this becomes None, and it is not asked again.
        self._artifact = post_artifact(_update_progress, artifact_id=self._artifact, progress=share)


def _create_progress(**fields: Any) -> Any:
    from prefect.artifacts import create_progress_artifact

    return create_progress_artifact(**fields)


def _update_progress(**fields: Any) -> Any:
    from prefect.artifacts import update_progress_artifact

    return update_progress_artifact(**fields)

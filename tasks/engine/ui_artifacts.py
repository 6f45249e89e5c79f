"""Room `tasks`: what Prefect's artifacts have in common: keys that stay from run to run, and a run that goes on without them."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from typing import Any

from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.context import FlowRunContext, TaskRunContext

from secateur.tasks.engine.prefect_server import has_lasting_server
from secateur.tasks.engine.progress import print_status
from secateur.tasks.run.run import Run

DATED = re.compile(r"[-_.]?\d{4}-\d{2}-\d{2}([-_.T]?\d{4,6})?$")  # as `dated` names scheduled runs
SECONDS_BETWEEN = 3.0


def artifact_key(run: Run, *parts: str) -> str:
    """An artifact's key: the run's name without a date at its end, so that every night's run adds to one history."""
    words = [
        re.sub(r"[^a-z0-9]+", "-", word.lower()).strip("-")
        for word in (DATED.sub("", run.plan.run), *parts)
    ]
    return "-".join(["secateur", *filter(None, words)])


def post_artifact(create: Callable[..., Any], **fields: Any) -> Any:
    """Makes an artifact of the Prefect run that this is within, where a server keeps it. Failing to is no reason to fail."""
    if not has_lasting_server() or (TaskRunContext.get() is None and FlowRunContext.get() is None):
        return None
    try:
        return create(**fields)
    except Exception as error:
        print_status(
            f"Prefect does not take the artifact {fields.get('key', '')} ({type(error).__name__}); the run goes on"
        )
        return None


class ProgressArtifact:
    """A progress artifact of something that takes long."""

    def __init__(self, run: Run, what: str, total: int) -> None:
        self.total = max(1, total)
        self._shown = time.monotonic()
        self._artifact = post_artifact(
            create_progress_artifact,
            progress=0.0,
            key=artifact_key(run, what),
            description=f"{run.plan.run}: {what}",
        )

    def reach(self, done: int) -> None:
        """Shows how much is done, not too often."""
        now = time.monotonic()
        if self._artifact is None or (done < self.total and now - self._shown < SECONDS_BETWEEN):
            return
        self._shown = now
        share = 100.0 * done / self.total  # a server that did not take it is not asked again
        self._artifact = post_artifact(
            update_progress_artifact, artifact_id=self._artifact, progress=share
        )

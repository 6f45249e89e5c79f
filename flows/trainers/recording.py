"""A recording that reports when its stage is trained, so that Prefect prunes it."""

from __future__ import annotations

from secateur.tasks.engine.progress import print_status
from secateur.tasks.external.recording import StageRecording
from secateur.tasks.results.training_results import TrainingResult


class Recording(StageRecording):
    __doc__ = StageRecording.__doc__

    def finish(self) -> TrainingResult:
        """Commit the remaining steps, and emit `secateur.stage.trained`, once for all processes.

        Training does not fail if the event cannot be sent.
        """
        result = super().finish()
        if not self.ranks.is_first:
            return result
        problem = _server_problem()
        if problem is None:
            from secateur.flows import events

            events.emit_trained(self.run.url, self.stage)
        else:
            print_status(
                f"stage {self.stage} of {self.run.url} is trained; {problem}, so nothing was "
                f"triggered: `secateur prune {self.run.url} --stage {self.stage}` prunes it"
            )
        return result


def _server_problem() -> str | None:
    """Why events cannot be sent, or None."""
    # Imported here, because Prefect is slow to import and training does not need it.
    from prefect.client.orchestration import get_client
    from prefect.settings import get_current_settings

    url = get_current_settings().api.url
    if url is None:
        return "no Prefect server is configured"
    problem: Exception | None
    try:
        with get_client(sync_client=True) as client:
            problem = client.api_healthcheck()
    except Exception as error:  # whatever it is, the stage is trained
        problem = error
    if problem is None:
        return None
    return f"the Prefect server {url} does not answer ({type(problem).__name__})"

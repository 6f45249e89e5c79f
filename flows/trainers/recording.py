"""Room `flows.trainers`: a recording that tells, once its stage is trained, so that Prefect prunes it."""

from __future__ import annotations

from prefect.client.orchestration import get_client
from prefect.settings import get_current_settings

from secateur.flows import events
from secateur.tasks.engine.progress import print_status
from secateur.tasks.external import recording
from secateur.tasks.training.train import TrainingResult


class Recording(recording.Recording):
    __doc__ = recording.Recording.__doc__

    def finish(self) -> TrainingResult:
        """Commits what is left, and emits `secateur.stage.trained`; training does not fail where nobody can be told."""
        trained = super().finish()
        if (why := _unreachable()) is None:
            events.emit_trained(self.run.url, self.stage)
        else:
            print_status(
                f"stage {self.stage} of {self.run.url} is trained; {why}, so nothing was triggered: "
                f"`secateur prune {self.run.url} --stage {self.stage}` prunes it"
            )
        return trained


def _unreachable() -> str | None:
    """Why no server can be told, if none can."""
    if (url := get_current_settings().api.url) is None:
        return "no Prefect server is configured"
    try:
        with get_client(sync_client=True) as client:
            problem = client.api_healthcheck()
    except Exception as error:  # whatever it is, training has not failed
        problem = error
    return (
        None
        if problem is None
        else f"the Prefect server {url} does not answer ({type(problem).__name__})"
    )

"""Room `flows.trainers`: a recording that tells, once its stage is trained, so that Prefect prunes it."""

from __future__ import annotations

from prefect.client.orchestration import get_client
from prefect.settings import get_current_settings

from flows import events
from tasks import outside
from tasks.progress import say
from tasks.train import Trained


class Recording(outside.Recording):
    __doc__ = outside.Recording.__doc__

    def finish(self) -> Trained:
        """Commits what is left, and emits `secateur.stage.trained`; training does not fail where nobody can be told."""
        trained = super().finish()
        if (why := _unreachable()) is None:
            events.trained(self.run.url, self.stage)
        else:
            say(
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
    return None if problem is None else f"the Prefect server {url} does not answer ({type(problem).__name__})"

"""Room `tasks`: waiting for the shards of the next stage, which another process prunes."""

from __future__ import annotations

import time

from tasks.errors import PlanError
from tasks.progress import SECONDS_BETWEEN_LINES, say
from tasks.prune import OWN
from tasks.run import Run
from tasks.samples import stage_shards
from tasks.trust import refusal


def wait_for_shards(run: str, stage: int, timeout: float | None = None, poll: float = 2.0) -> list[str]:
    """Waits until a stage is pruned, saying so now and then.

    Args:
        run: path or URL of the run's folder.
        timeout: seconds; None for as long as it takes.
        poll: seconds between looks.

    Returns:
        Paths or URLs of the shards that the next stage trains on.

    Raises:
        PlanError: the plan does not prune the stage, a trust gate forbids it, nothing was kept, or the time is up.
    """
    opened = Run.open(run)
    if not (0 <= stage < len(opened.plan.stages)) or opened.plan.stages[stage].prune is None:
        raise PlanError(
            f"the plan of {opened.url} does not prune a stage {stage}, so no shards will come; see its `stages`"
        )
    start = shown = time.monotonic()
    while not opened.folder.stage(stage).prune(OWN).committed:
        if why := refusal(opened, stage, OWN):
            raise PlanError(why)
        now = time.monotonic()
        state = "trained" if opened.folder.stage(stage).trained.committed else "not trained yet"
        if timeout is not None and now - start >= timeout:
            raise PlanError(
                f"stage {stage} of {opened.url} is {state} and was not pruned in {timeout:g} s; look whether a Prefect worker "
                f"serves the deployment of `prune`, or run `secateur prune {opened.url} --stage {stage}`"
            )
        if now - shown >= SECONDS_BETWEEN_LINES:
            shown = now
            say(f"stage {stage} of {opened.url} is {state}; waited {now - start:.0f} s for its shards")
        time.sleep(poll)
    return stage_shards(opened, stage + 1)

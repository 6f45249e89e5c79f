"""Room `flows.trainers`: waiting for the shards of the next stage, which another process prunes."""

from __future__ import annotations

import time

from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterName
from prefect.client.schemas.sorting import FlowRunSort
from prefect.settings import get_current_settings

from secateur.errors import PlanError
from secateur.flows.run_lock import absolute_url
from secateur.tasks.data.samples import stage_shard_urls
from secateur.tasks.engine.progress import SECONDS_BETWEEN_LINES, print_status
from secateur.tasks.pruning.gates import refusal_reason
from secateur.tasks.pruning.prune import PLAN_PRUNING
from secateur.tasks.run.run import Run


def wait_for_shards(
    run: str, stage: int, timeout: float | None = None, poll: float = 2.0
) -> list[str]:
    """Waits until a stage is pruned, saying so now and then.

    Args:
        run: path or URL of the run's folder.
        timeout: seconds; None for as long as it takes.
        poll: seconds between looks.

    Returns:
        Paths or URLs of the shards that the next stage trains on.

    Raises:
        PlanError: the plan does not prune the stage, a trust gate forbids it, the flow run that should have pruned it has
            failed, nothing was kept, or the time is up.
    """
    opened = Run.open(run)
    if not (0 <= stage < len(opened.plan.stages)) or opened.plan.stages[stage].prune is None:
        raise PlanError(
            f"the plan of {opened.url} does not prune a stage {stage}, so no shards will come; see its `stages`"
        )
    start = shown = time.monotonic()
    while not opened.folder.stage(stage).prune(PLAN_PRUNING).committed:
        now, trained = time.monotonic(), opened.folder.stage(stage).trained.committed
        state = "trained" if trained else "not trained yet"
        late, due = (
            timeout is not None and now - start >= timeout,
            now - shown >= SECONDS_BETWEEN_LINES,
        )
        if why := refusal_reason(opened, stage, PLAN_PRUNING) or (
            _failure(opened, stage) if trained and (late or due) else None
        ):
            raise PlanError(why)
        if late:
            raise PlanError(
                f"stage {stage} of {opened.url} is {state} and was not pruned in {timeout:g} s; look whether a Prefect worker "
                f"serves the deployment of `prune`, or run `secateur prune {opened.url} --stage {stage}`"
            )
        if due:
            shown = now
            print_status(
                f"stage {stage} of {opened.url} is {state}; waited {now - start:.0f} s for its shards"
            )
        time.sleep(poll)
    return stage_shard_urls(opened, stage + 1)


def _failure(run: Run, stage: int) -> str | None:
    """How the last flow run that was to prune a stage has failed; one that came before the stage was trained counts not."""
    if get_current_settings().api.url is None:
        return None
    name = FlowRunFilter(name=FlowRunFilterName(any_=[f"prune {absolute_url(run)} stage {stage}"]))
    with get_client(sync_client=True) as client:
        found = client.read_flow_runs(
            flow_run_filter=name, sort=FlowRunSort.EXPECTED_START_TIME_DESC, limit=1
        )
    if (
        not found
        or found[0].state is None
        or not (found[0].state.is_failed() or found[0].state.is_crashed())
    ):
        return None
    message = str(found[0].state.message or found[0].state.name)
    if "not wholly trained" in message:
        return None
    return f"stage {stage} of {run.url} is not pruned, flow run {found[0].id} has failed ({message}); mend that and retry it"

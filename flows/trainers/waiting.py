"""Wait for the shards of the next stage, which another process prunes."""

from __future__ import annotations

import time

from secateur.errors import PlanError
from secateur.flows.run_lock import absolute_url
from secateur.storage.layout import PLAN_PRUNING
from secateur.tasks.data.samples import stage_shard_urls
from secateur.tasks.engine.progress import SECONDS_BETWEEN_LINES, print_status
from secateur.tasks.pruning.gates import refusal_reason
from secateur.tasks.run import Run


def wait_for_shards(
    run: str, stage: int, timeout: float | None = None, poll: float = 2.0
) -> list[str]:
    """Wait until a stage is pruned, and print a line now and then.

    Args:
        run: path or URL of the run's folder.
        timeout: most seconds to wait; no limit if None.
        poll: seconds between checks.

    Returns:
        Paths or URLs of the shards that the next stage trains on.

    Raises:
        PlanError: the plan does not prune the stage, a trust gate forbids it, the flow run that
            should have pruned it failed, no sample was kept, or the time is over.
    """
    opened = Run.open(run)
    if not 0 <= stage < len(opened.plan.stages) or opened.plan.stages[stage].prune is None:
        raise PlanError(
            f"the plan of {opened.url} does not prune a stage {stage}, so no shards will come; see "
            f"its `stages`"
        )
    start = last_line = time.monotonic()
    while not opened.folder.stage(stage).prune(PLAN_PRUNING).committed:
        now = time.monotonic()
        is_late = timeout is not None and now - start >= timeout
        is_line_due = now - last_line >= SECONDS_BETWEEN_LINES
        # Prefect is asked only now and then, because that is a request to its server.
        _check_possible(opened, stage, ask_prefect=is_late or is_line_due)
        if is_late:
            raise PlanError(
                f"{_state(opened, stage)} and was not pruned in {timeout:g} s; check whether a "
                f"Prefect worker serves the deployment of `prune`, or run "
                f"`secateur prune {opened.url} --stage {stage}`"
            )
        if is_line_due:
            last_line = now
            print_status(f"{_state(opened, stage)}; waited {now - start:.0f} s for its shards")
        time.sleep(poll)
    return stage_shard_urls(opened, stage + 1)


def _state(run: Run, stage: int) -> str:
    trained = run.folder.stage(stage).trained.committed
    return f"stage {stage} of {run.url} is {'trained' if trained else 'not trained yet'}"


def _check_possible(run: Run, stage: int, ask_prefect: bool) -> None:
    """Raise if the stage will not be pruned, as far as that is known."""
    problem = refusal_reason(run, stage, PLAN_PRUNING)
    if problem is None and ask_prefect and run.folder.stage(stage).trained.committed:
        problem = _flow_run_failure(run, stage)
    if problem is not None:
        raise PlanError(problem)


def _flow_run_failure(run: Run, stage: int) -> str | None:
    """How the last flow run that should prune the stage failed, or None."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterName
    from prefect.client.schemas.sorting import FlowRunSort
    from prefect.settings import get_current_settings

    if get_current_settings().api.url is None:
        return None
    name = FlowRunFilterName(any_=[f"prune {absolute_url(run)} stage {stage}"])
    with get_client(sync_client=True) as client:
        flow_runs = client.read_flow_runs(
            flow_run_filter=FlowRunFilter(name=name),
            sort=FlowRunSort.EXPECTED_START_TIME_DESC,
            limit=1,
        )
    if not flow_runs:
        return None
    state = flow_runs[0].state
    if state is None or not (state.is_failed() or state.is_crashed()):
        return None
    message = str(state.message or state.name)
    # A flow run that came before the stage was trained says nothing about now.
    if "not trained to its end" in message:
        return None
    return (
        f"stage {stage} of {run.url} is not pruned, because flow run {flow_runs[0].id} failed "
        f"({message}); fix that and retry it"
    )

"""Room `flows`: what `prefect deploy` and schedules need beside the flows."""

from __future__ import annotations

from typing import Any

from prefect.runtime import flow_run

from secateur.tasks.plan import Plan
from secateur.tasks.plan.plan_file import read_plan


def plan_parameter(path: str) -> dict[str, Any]:
    """A build step of prefect.yaml: reads a plan file, so that a deployment's parameter is the plan itself, which the UI
    shows as a form.

    Returns:
        `plan`: its keys.
    """
    return {"plan": read_plan(path).model_dump(mode="json", exclude_unset=True)}


def with_scheduled_date(plan: Plan) -> Plan:
    """The plan under the name of its run and the time this flow run was scheduled for, which retries keep."""
    return plan.model_copy(
        update={"run": f"{plan.run}-{flow_run.scheduled_start_time:%Y-%m-%d-%H%M}"}
    )

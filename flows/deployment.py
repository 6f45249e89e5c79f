"""Functions that `prefect deploy` and scheduled flow runs use."""

from __future__ import annotations

from typing import Any

from prefect.runtime import flow_run

from secateur.tasks.plan import Plan
from secateur.tasks.plan.plan_file import read_plan


def plan_parameter(path: str) -> dict[str, Any]:
    """Read a plan file, as a build step of prefect.yaml.

    The deployment's parameter is then the plan itself, which the UI shows as a form.

    Returns:
        `plan`: the plan's keys and values.
    """
    return {"plan": read_plan(path).model_dump(mode="json", exclude_unset=True)}


def with_scheduled_date(plan: Plan) -> Plan:
    """Return the plan with the scheduled time of this flow run after the run's name.

    A retry keeps the scheduled time, so it continues the same run.
    """
    date = f"{flow_run.scheduled_start_time:%Y-%m-%d-%H%M}"
    return plan.model_copy(update={"run": f"{plan.run}-{date}"})

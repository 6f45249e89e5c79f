"""Read a plan from a YAML file, and write it back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from secateur.errors import PlanError
from secateur.tasks.plan.plan import Plan
from secateur.tasks.plan.plan_errors import describe_error

M = TypeVar("M", bound=BaseModel)


def read_plan(path: str | Path, changes: dict[str, Any] | None = None) -> Plan:
    """Read a plan file.

    Args:
        path: the YAML file.
        changes: values that replace top-level keys.

    Raises:
        PlanError: the file is missing, is not YAML, or is not a plan.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise PlanError(f"the plan {path} cannot be read: {error}") from error
    return parse_plan(text, str(path), changes)


def parse_plan(text: str, where: str, changes: dict[str, Any] | None = None) -> Plan:
    """Read a plan from YAML text; `where` names the text in errors."""
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise PlanError(f"the plan {where} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise PlanError(f"the plan {where} has no keys; docs/plan.md lists those it needs")
    return validate_model(Plan, values | (changes or {}), f"the plan {where}")


def validate_model(model: type[M], values: Any, what: str) -> M:
    """Read a plan, or a part of one, from its keys; `what` names it in errors.

    Raises:
        PlanError: the keys or their values are wrong.
    """
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise PlanError(f"{what}: {describe_error(error, model)}") from error


def plan_text(plan: Plan) -> str:
    """Return the plan as YAML that `parse_plan` reads back."""
    return yaml.safe_dump(plan.model_dump(mode="json"), sort_keys=False)


def plan_schema() -> str:
    """Return the JSON schema of a plan, for editors."""
    return json.dumps(Plan.model_json_schema(), indent=2) + "\n"

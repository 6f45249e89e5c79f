"""Room `tasks`: reading a plan file, and saying in one sentence what is wrong with it."""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError

from secateur.errors import PlanError
from secateur.tasks.plan import Plan
from secateur.tasks.plan.stages import GIVEN

M = TypeVar("M", bound=BaseModel)


def read_plan(path: str, changes: dict[str, Any] | None = None) -> Plan:
    """Reads a plan file; `changes` replaces top-level keys.

    Raises:
        PlanError: the file is missing, no YAML, or no plan.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise PlanError(f"the plan {path} cannot be read: {error}") from error
    return parse_plan(text, path, changes)


def parse_plan(text: str, where: str, changes: dict[str, Any] | None = None) -> Plan:
    """Reads a plan from YAML text; `where` names it in errors."""
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise PlanError(f"the plan {where} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise PlanError(f"the plan {where} holds no keys; see docs/plan.md for what it needs")
    return validate_model(Plan, values | (changes or {}), f"the plan {where}")


def validate_model(model: type[M], values: Any, what: str) -> M:
    """A plan, or a part of one, from its keys; `what` names it in errors.

    Raises:
        PlanError: it is none.
    """
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise PlanError(f"{what}: {_sentence(error, model)}") from error


def plan_text(plan: Plan) -> str:
    """The plan as YAML that `parse_plan` reads back."""
    return yaml.safe_dump(plan.model_dump(mode="json"), sort_keys=False)


def plan_schema() -> str:
    """The JSON schema of a plan, for editors."""
    return json.dumps(Plan.model_json_schema(), indent=2) + "\n"


def _sentence(error: ValidationError, model: type[BaseModel]) -> str:
    """Every finding, the first in full, the rest counted."""
    first, rest = error.errors()[0], error.error_count() - 1
    where = ".".join(str(part) for part in first["loc"] if part != GIVEN) or "as a whole"
    if first["type"] == "extra_forbidden":
        key = str(first["loc"][-1])
        known = _fields_at(model, first["loc"][:-1])
        near = difflib.get_close_matches(key, known, 1, cutoff=0.5)
        hint = f"did you mean `{near[0]}`?" if near else f"known are {', '.join(sorted(known))}"
        message = f"unknown key `{where}`; {hint}"
    elif first["type"] == "union_tag_not_found":
        message = f"`{where}` needs {first['ctx']['discriminator'].replace(chr(39), '`')}; see docs/plan.md for which there are"
    else:
        message = f"`{where}`: {first['msg'].removeprefix('Value error, ')}"
    return message + (f" (and {rest} more)" if rest else "")


def _fields_at(root: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    """Known keys of the model found by following `location` down from `root`."""
    models: list[type[BaseModel]] = [root]
    for part in location:
        if isinstance(part, int):
            continue
        below = [m for model in models for m in _models_in(model, part)]
        tagged = [m for m in models if part in _tags(m)]
        models = below or tagged or models
    return sorted({name for model in models for name in model.model_fields})


def _models_in(model: type[BaseModel], field: str) -> list[type[BaseModel]]:
    """Models that a field's annotation mentions."""
    if field not in model.model_fields:
        return []
    found, queue = [], [model.model_fields[field].annotation]
    while queue:
        kind = queue.pop()
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            found.append(kind)
        queue.extend(get_args(kind))
    return found


def _tags(model: type[BaseModel]) -> set[str]:
    """The value of the field that tells a model from its alternatives: a location names it."""
    return {
        str(field.default)
        for name, field in model.model_fields.items()
        if name in ("policy", "kind")
    }

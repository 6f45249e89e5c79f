"""Say in one sentence what is wrong with a plan, from pydantic's validation errors."""

from __future__ import annotations

import difflib
from typing import get_args

from pydantic import BaseModel, ValidationError

from secateur.tasks.plan.registry import Registry
from secateur.tasks.plan.stage_config import LISTED

TAGS = ("policy", "kind")


def describe_error(error: ValidationError, model: type[BaseModel]) -> str:
    """Return a sentence with the first finding in full, and the number of further ones."""
    first = error.errors()[0]
    further = error.error_count() - 1
    where = ".".join(_keys_in(model, first["loc"])) or "as a whole"
    if first["type"] == "extra_forbidden":
        message = f"unknown key `{where}`; {_hint(model, first['loc'])}"
    elif first["type"] == "union_tag_not_found":
        tag = first["ctx"]["discriminator"].replace("'", "`")
        message = f"`{where}` needs {tag}; docs/plan.md lists the possible values"
    else:
        message = f"`{where}`: {first['msg'].removeprefix('Value error, ')}"
    return message + (f" (and {further} more)" if further else "")


def _hint(model: type[BaseModel], location: tuple[int | str, ...]) -> str:
    """Suggest the nearest known key, or list the known ones."""
    known = sorted({name for one in _models_at(model, location[:-1]) for name in one.model_fields})
    near = difflib.get_close_matches(str(location[-1]), known, 1, cutoff=0.5)
    return f"did you mean `{near[0]}`?" if near else f"known keys are {', '.join(known)}"


def _keys_in(model: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    """The parts of a location that a user writes; pydantic adds the tags of alternatives."""
    parts = []
    for length, part in enumerate(location):
        alternatives = _models_at(model, location[:length])
        is_tag = part == LISTED or any(part in _tags(one) for one in alternatives)
        if not (is_tag and isinstance(part, str)):
            parts.append(str(part))
    return parts


def _models_at(root: type[BaseModel], location: tuple[int | str, ...]) -> list[type[BaseModel]]:
    """The settings classes found by following `location` down from `root`."""
    models = [root]
    for part in location:
        if isinstance(part, int):
            continue
        below = [inner for model in models for inner in _models_in(model, part)]
        tagged = [model for model in models if part in _tags(model)]
        models = below or tagged or models
    return models


def _models_in(model: type[BaseModel], field: str) -> list[type[BaseModel]]:
    """The settings classes that a field may hold."""
    if field not in model.model_fields:
        return []
    info = model.model_fields[field]
    models: list[type[BaseModel]] = []
    queue = [info.annotation, *info.metadata]
    while queue:
        kind = queue.pop()
        if isinstance(kind, Registry):
            return list(kind.classes().values())
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            models.append(kind)
        queue.extend(get_args(kind))
    return models


def _tags(model: type[BaseModel]) -> set[str]:
    """The value of the key that tells a settings class from its alternatives."""
    return {str(field.default) for name, field in model.model_fields.items() if name in TAGS}

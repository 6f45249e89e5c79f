"""Registries: which settings class a part of the plan has, by the value of one of its keys.

Built-in classes register themselves in the same way as a user's plug-in does. A registry imports
the module of its built-ins at first use, so the plan does not depend on the rooms that hold them.
"""

from __future__ import annotations

import importlib
import sys
from typing import Any, Generic, TypeVar

from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler, ValidationError
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, InitErrorDetails, PydanticKnownError, core_schema

from secateur.errors import PlanError
from secateur.tasks.plan.base import Config

C = TypeVar("C", bound=Config)


class Registry(Generic[C]):
    """Settings classes of one kind (policies, curvatures, optimizers), by name.

    A plan's field is annotated `Annotated[Base, registry]`; pydantic then reads its value as the
    registered class that the field's `tag` key names.

    Args:
        base: the class that every registered class inherits from.
        tag: the key whose default value is the class's name, `policy` or `kind`.
        builtins: the module that registers the package's own classes when it is imported.
    """

    def __init__(self, base: type[C], tag: str, builtins: str) -> None:
        self.base = base
        self.tag = tag
        self._builtins = builtins
        self._classes: dict[str, type[C]] = {}

    def register(self, cls: type[C]) -> type[C]:
        """Register a class under the default of its tag. Used as a decorator.

        Raises:
            PlanError: it has no default for the tag, or another class has the name.
        """
        name = cls.model_fields[self.tag].default
        if not isinstance(name, str):
            raise PlanError(
                f"{cls.__qualname__} has no default for `{self.tag}`, so it has no name; add "
                f'`{self.tag}: Literal["..."] = "..."`'
            )
        known = self._classes.get(name)
        # A file may be imported twice, as a script and as a module, and then registers twice.
        if known is not None and _source(known) != _source(cls):
            raise PlanError(
                f"{known.__module__}.{known.__qualname__} and {cls.__module__}.{cls.__qualname__} "
                f"both register the {self.tag} {name}; rename one"
            )
        self._classes[name] = cls
        return cls

    def classes(self) -> dict[str, type[C]]:
        """Return every registered class by name, the built-in ones included."""
        importlib.import_module(self._builtins)
        return dict(self._classes)

    def names(self) -> list[str]:
        """Return the registered names."""
        return list(self.classes())

    def parse(self, value: Any) -> C:
        """Read settings as the class that their tag names.

        Args:
            value: a mapping of keys, or an instance of `base`.

        Raises:
            ValidationError: the tag is missing or unknown, or the class refuses the settings.
                The location of an error begins with the class's name.
        """
        if isinstance(value, self.base):
            return value
        quoted = f"'{self.tag}'"
        if not isinstance(value, dict) or self.tag not in value:
            raise PydanticKnownError("union_tag_not_found", {"discriminator": quoted})
        classes, name = self.classes(), value[self.tag]
        if name not in classes:
            expected = ", ".join(f"'{known}'" for known in classes)
            context = {"discriminator": quoted, "tag": str(name), "expected_tags": expected}
            raise PydanticKnownError("union_tag_invalid", context)
        try:
            return classes[name].model_validate(value)
        except ValidationError as error:
            raise _at(error, name) from None

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(self.parse)

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        choices = {name: cls.__pydantic_core_schema__ for name, cls in self.classes().items()}
        return handler(core_schema.tagged_union_schema(choices, discriminator=self.tag))


def _source(cls: type) -> tuple[str | None, str]:
    """The file and the name of a class."""
    module = sys.modules.get(cls.__module__)
    return getattr(module, "__file__", None), cls.__qualname__


def _at(error: ValidationError, name: str) -> ValidationError:
    """The same errors, with the name of the class at the beginning of each location."""
    details = [
        InitErrorDetails(
            type=one["type"],
            loc=(name, *one["loc"]),
            input=one["input"],
            ctx=one.get("ctx", {}),
        )
        for one in error.errors()
    ]
    return ValidationError.from_exception_data(error.title, details, hide_input=True)

"""What the commands share: errors as sentences, the options of a policy, and printing results."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

from secateur.errors import PlanError, SecateurError

if TYPE_CHECKING:
    from pydantic import ValidationError

    from secateur.tasks.plan import Policy

# Exit codes after Ctrl-C (as typer exits) and after SIGTERM (as schedulers expect).
INTERRUPTED, TERMINATED = 130, 143


@contextmanager
def errors_as_sentences() -> Iterator[None]:
    """Print one sentence and exit with 2 for what a user can get wrong."""
    try:
        yield
    except SecateurError as error:
        print(f"secateur: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except SystemExit as end:
        if end.code in (INTERRUPTED, TERMINATED):
            print(
                "secateur: interrupted; the same command continues after the last whole segment",
                file=sys.stderr,
            )
        raise


def read_policy(settings: dict[str, Any]) -> Policy:
    """Return the policy that the options of `secateur prune` describe.

    Raises:
        PlanError: the options do not describe one.
    """
    from pydantic import TypeAdapter, ValidationError

    from secateur.tasks.plan import POLICIES

    try:
        adapter = TypeAdapter[Any](Annotated[Any, POLICIES])
        policy: Policy = adapter.validate_python(settings)
    except ValidationError as error:
        names = ", ".join(POLICIES.names())
        raise PlanError(_option_sentence(error, settings, names)) from error
    return policy


def _option_sentence(error: ValidationError, settings: dict[str, Any], names: str) -> str:
    """What is wrong with the options of `secateur prune`."""
    first = error.errors()[0]
    policy = settings.get("policy")
    key = str(first["loc"][-1] if first["loc"] else "policy")
    option = f"--{key.replace('_', '-')}"
    if first["type"] == "missing":
        return f"--policy {policy} needs {option}"
    if first["type"] == "extra_forbidden":
        return f"--policy {policy} takes no {option}; leave it out"
    if option == "--policy":
        return f"--policy is {policy or 'missing'}; give one of {names}"
    return f"{option}: {first['msg'].lower()}"


def print_lines(lines: list[str], otherwise: str) -> None:
    """Print lines, or another line if there are none."""
    print("\n".join(lines) or otherwise)


def show_result(value: Any, as_json: bool, print_table: Callable[[], None]) -> None:
    """Print one JSON document, or the table."""
    if not as_json:
        print_table()
        return
    from pydantic import TypeAdapter

    print(json.dumps(TypeAdapter(Any).dump_python(value, mode="json"), indent=1))

"""Room `tasks.comparison`: arms, which differ from a plan in how it prunes, and the plans that they come to."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import NonNegativeInt, PositiveFloat

from tasks.errors import PlanError
from tasks.plan import Plan
from tasks.plan.base import Fraction, Strict
from tasks.reading import validated

PLAN, RANDOM, UNPRUNED = "plan", "random", "unpruned"
POLICY_KEYS = {"policy", "keep", "at_least", "by", "prefer"}
WITHOUT_KEEP = {"threshold", "drop_harmful"}
NAME = re.compile(r"[\w.-]+")


class Arm(Strict):
    """What an arm has instead of the plan's own: another policy (`none` for no pruning), other score settings, or both.

    A policy that needs `keep` takes the plan's, or the share that the plan's own policy came to keep.
    """

    policy: str | None = None
    keep: Fraction | None = None
    at_least: float | None = None
    by: str | None = None
    prefer: Literal["lowest", "highest"] | None = None
    horizon: NonNegativeInt | Literal["stage"] | None = None
    aggregate: Literal["mean", "nearest"] | None = None
    estimate: Literal["embedding", "replay"] | None = None
    temperature: PositiveFloat | None = None

    @property
    def policy_settings(self) -> dict[str, Any]:
        """What is given of the policy."""
        return self.model_dump(include=POLICY_KEYS, exclude_none=True)

    @property
    def score_settings(self) -> dict[str, Any]:
        """What is given of the score."""
        return self.model_dump(exclude=POLICY_KEYS, exclude_none=True)


ALWAYS = {PLAN: Arm(), RANDOM: Arm(policy="random"), UNPRUNED: Arm(policy="none")}


def read_arms(options: list[str], path: str | None = None) -> dict[str, dict[str, Any]]:
    """Arms' settings from a YAML file of `name: {key: value}`, and from options: a policy's name, or
    `name=key:value,key:value`.

    Raises:
        PlanError: the file cannot be read, or an option has another form.
    """
    found: dict[str, Any] = {}
    if path is not None:
        try:
            found = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise PlanError(f"the arms {path} cannot be read: {' '.join(str(error).split())}") from error
        if not isinstance(found, dict):
            raise PlanError(f"the arms {path} are no mapping; give lines like `el2n: {{policy: el2n, keep: 0.5}}`")
    for option in options:
        name, equals, settings = option.partition("=")
        pairs = [part.partition(":") for part in settings.split(",")]
        if equals and not all(colon for _, colon, _ in pairs):
            raise PlanError(f"--arm {option} is no arm; give a policy's name, or name=key:value,key:value")
        found[name] = {key: yaml.safe_load(value) for key, _, value in pairs} if equals else {"policy": name}
    return {str(name): settings for name, settings in found.items()}


def check_arms(settings: dict[str, dict[str, Any]]) -> dict[str, Arm]:
    """The arms that every comparison has, and those of some settings.

    Raises:
        PlanError: one is no arm.
    """
    for name in settings:
        if name in ALWAYS:
            raise PlanError(f"every comparison has an arm {name}; choose another name")
        if not NAME.fullmatch(name):
            raise PlanError(f"{name!r} is no name for an arm; use letters, digits, `.`, `_` and `-`")
    return ALWAYS | {name: validated(Arm, values, f"the arm {name}") for name, values in settings.items()}


def arm_plan(plan: Plan, name: str, arm: Arm, shares: dict[int, float]) -> Plan:
    """The plan of an arm: the plan itself but for pruning, gates and audits.

    Args:
        plan: the comparison's, for one seed.
        shares: the share that the plan's own policy kept of each stage's judged samples.

    Raises:
        PlanError: the arm's settings do not go together.
    """
    values = plan.model_dump(mode="json") | {"run": name}
    if name != PLAN:
        values["trust"], values["audit"] = {}, None
        values["score"] |= arm.score_settings
        for number, stage in enumerate(values["stages"]):
            stage["prune"] = _policy(arm, stage["prune"], shares.get(number))
    return validated(Plan, values, f"the arm {name}")


def _policy(arm: Arm, own: dict[str, Any] | None, share: float | None) -> dict[str, Any] | None:
    """A stage's policy in an arm; where the plan does not prune, no arm does."""
    if own is None or arm.policy == "none":
        return None
    if arm.policy in (None, own["policy"]):
        return own | arm.policy_settings
    kept = share if arm.policy == RANDOM else own.get("keep", share)
    return ({} if arm.policy in WITHOUT_KEEP else {"keep": kept}) | arm.policy_settings

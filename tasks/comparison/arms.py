"""Room `tasks.comparison`: arms, which differ from a plan in how it prunes, and the plans that they come to."""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Any, get_args

import yaml

from secateur.errors import PlanError
from secateur.tasks.plan import Plan, Policy, ScoreConfig
from secateur.tasks.plan.plan_file import validate_model

# What an arm has instead of the plan's own, by key: those of another policy (`policy: none` for no pruning) and of other
# score settings. A policy that needs `keep` takes the plan's, or the share that the plan's own policy came to keep.
Arm = dict[str, Any]

PLAN, RANDOM, UNPRUNED = "plan", "random", "unpruned"
ALWAYS: dict[str, Arm] = {PLAN: {}, RANDOM: {"policy": "random"}, UNPRUNED: {"policy": "none"}}
KINDS = {
    kind.model_fields["policy"].default: set(kind.model_fields)
    for kind in get_args(get_args(Policy)[0])
}
POLICY_KEYS = set[str]().union(*KINDS.values())
SCORE_KEYS = set(ScoreConfig.model_fields) - {"target"}
NAME = re.compile(r"[\w.-]+")


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
            raise PlanError(
                f"the arms {path} cannot be read: {' '.join(str(error).split())}"
            ) from error
        if not isinstance(found, dict):
            raise PlanError(
                f"the arms {path} are no mapping; give lines like `el2n: {{policy: el2n, keep: 0.5}}`"
            )
    for option in options:
        name, equals, settings = option.partition("=")
        pairs = [part.partition(":") for part in settings.split(",")]
        if equals and not all(colon for _, colon, _ in pairs):
            raise PlanError(
                f"--arm {option} is no arm; give a policy's name, or name=key:value,key:value"
            )
        found[name] = (
            {key: yaml.safe_load(value) for key, _, value in pairs} if equals else {"policy": name}
        )
    return {str(name): settings for name, settings in found.items()}


def check_arms(settings: dict[str, Arm]) -> dict[str, Arm]:
    """The arms that every comparison has, and those of some settings.

    Raises:
        PlanError: one is no arm.
    """
    for name, arm in settings.items():
        if name in ALWAYS:
            raise PlanError(f"every comparison has an arm {name}; choose another name")
        if not NAME.fullmatch(name):
            raise PlanError(
                f"{name!r} is no name for an arm; use letters, digits, `.`, `_` and `-`"
            )
        if not isinstance(arm, dict):
            raise PlanError(
                f"the arm {name} is {arm!r}; give settings, as in `{name}: {{policy: loss}}`"
            )
        for key in map(str, arm):
            if key not in POLICY_KEYS | SCORE_KEYS:
                known = sorted(POLICY_KEYS | SCORE_KEYS)
                near = difflib.get_close_matches(key, known, 1, cutoff=0.5)
                hint = f"did you mean `{near[0]}`?" if near else f"known are {', '.join(known)}"
                raise PlanError(f"the arm {name}: unknown key `{key}`; {hint}")
    return ALWAYS | settings


def arm_plan(plan: Plan, name: str, arm: Arm, shares: dict[int, float]) -> Plan:
    """The plan of an arm: the plan itself but for pruning, gates and audits.

    Args:
        plan: the comparison's, for one seed.
        shares: the share that the plan's own policy kept of each stage's judged samples.

    Raises:
        PlanError: the arm's settings do not go together.
    """
    values = plan.model_dump(mode="json") | {"run": name}
    if arm != ALWAYS[PLAN]:
        values["trust"], values["audit"] = {}, None
        values["score"] |= {key: arm[key] for key in SCORE_KEYS & arm.keys()}
        for number, stage in enumerate(values["stages"]):
            stage["prune"] = _policy(arm, stage["prune"], shares.get(number))
    return validate_model(Plan, values, f"the arm {name}")


def _policy(arm: Arm, own: dict[str, Any] | None, share: float | None) -> dict[str, Any] | None:
    """A stage's policy in an arm; where the plan does not prune, no arm does."""
    given = {key: arm[key] for key in POLICY_KEYS & arm.keys()}
    if own is None or given.get("policy") == "none":
        return None
    if given.get("policy", own["policy"]) == own["policy"]:
        return own | given
    kept = share if given["policy"] == RANDOM else own.get("keep", share)
    return ({"keep": kept} if "keep" in KINDS.get(given["policy"], ()) else {}) | given

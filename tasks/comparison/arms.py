"""The arms of a comparison: how they differ from a plan, and the plans that result."""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Any

import yaml

from secateur.errors import PlanError
from secateur.tasks.plan import POLICIES, Plan, ScoreConfig
from secateur.tasks.plan.plan_file import validate_model

# The keys in which an arm differs from the plan: those of another policy (`policy: none` for no
# pruning) and of other score settings. If the arm gives no `keep` and its policy needs one, it gets
# the plan's `keep`, or else the share that the plan's own policy kept. A `random` policy always
# gets that share.
Arm = dict[str, Any]

PLAN, RANDOM, UNPRUNED = "plan", "random", "unpruned"
STANDARD_ARMS: dict[str, Arm] = {
    PLAN: {},
    RANDOM: {"policy": "random"},
    UNPRUNED: {"policy": "none"},
}
SCORE_KEYS = set(ScoreConfig.model_fields) - {"target"}
NAME = re.compile(r"[\w.-]+")


def read_arms(options: list[str], path: str | None = None) -> dict[str, Arm]:
    """Read arms' settings from a file and from command line options.

    Args:
        options: each is a policy's name, or `name=key:value,key:value`.
        path: a YAML file of `name: {key: value}`.

    Raises:
        PlanError: the file cannot be read, or an option has another form.
    """
    arms: dict[str, Any] = {} if path is None else _read_arms_file(path)
    for option in options:
        name, equals, settings = option.partition("=")
        if not equals:
            arms[name] = {"policy": name}
            continue
        pairs = [part.partition(":") for part in settings.split(",")]
        if not all(colon for _, colon, _ in pairs):
            raise PlanError(
                f"--arm {option} is not an arm; give a policy's name, or name=key:value,key:value"
            )
        arms[name] = {key: yaml.safe_load(value) for key, _, value in pairs}
    return {str(name): settings for name, settings in arms.items()}


def check_arms(settings: dict[str, Arm]) -> dict[str, Arm]:
    """Return the standard arms and the given ones, after checking the given ones.

    Args:
        settings: the given arms by name.

    Raises:
        PlanError: a name is taken or not allowed, or a key is not known.
    """
    for name, arm in settings.items():
        if name in STANDARD_ARMS:
            raise PlanError(f"every comparison has an arm {name}; choose another name")
        if not NAME.fullmatch(name):
            raise PlanError(f"{name!r} cannot name an arm; use letters, digits, `.`, `_` and `-`")
        if not isinstance(arm, dict):
            raise PlanError(
                f"the arm {name} is {arm!r}; give settings, as in `{name}: {{policy: loss}}`"
            )
        for key in map(str, arm):
            _check_key(name, key)
    return STANDARD_ARMS | settings


def arm_plan(plan: Plan, name: str, arm: Arm, shares: dict[int, float]) -> Plan:
    """Return the plan of an arm: the plan with other pruning, and without gates and audits.

    The plan's own arm keeps its gates and audits.

    Args:
        plan: the comparison's, for one seed.
        shares: for each stage, the share of its scored samples that the plan's own policy kept.

    Raises:
        PlanError: the arm's settings contradict one another.
    """
    values = plan.model_dump(mode="json") | {"run": name}
    if arm != STANDARD_ARMS[PLAN]:
        values["trust"] = {}
        values["audit"] = None
        values["score"] |= {key: arm[key] for key in SCORE_KEYS & arm.keys()}
        for number, stage in enumerate(values["stages"]):
            stage["prune"] = _arm_policy(arm, stage["prune"], shares.get(number))
    return validate_model(Plan, values, f"the arm {name}")


def check_shared_checkpoints(own: Plan, arm: Plan) -> None:
    """Check that an arm finds the checkpoints that it reads in the stages that it shares.

    Args:
        own: the plan of the comparison's own arm, which trains these stages.
        arm: the arm's plan.

    Raises:
        PlanError: own arm has removed them by then.
    """
    if own.checkpoints.keep == "segments":
        return
    for stage in range((own.first_pruned_stage or 0) + 1):
        # What the own arm read them for is shared too.
        own_readers = own.checkpoint_readers(stage)
        readers = [name for name in arm.checkpoint_readers(stage) if name not in own_readers]
        if readers:
            raise PlanError(
                f"in the arm {arm.run}, {readers[0]} reads the checkpoints within stage {stage}, "
                f"and the plan's own arm removes them; set `checkpoints: {{keep: segments}}`"
            )


def _read_arms_file(path: str) -> dict[str, Any]:
    try:
        arms = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise PlanError(f"the arms {path} cannot be read: {reason}") from error
    if not isinstance(arms, dict):
        raise PlanError(
            f"the arms {path} are not a mapping; give lines like "
            f"`el2n: {{policy: el2n, keep: 0.5}}`"
        )
    return arms


def _check_key(name: str, key: str) -> None:
    known = sorted(_policy_keys() | SCORE_KEYS)
    if key not in known:
        near = difflib.get_close_matches(key, known, 1, cutoff=0.5)
        hint = f"did you mean `{near[0]}`?" if near else f"known keys are {', '.join(known)}"
        raise PlanError(f"the arm {name}: unknown key `{key}`; {hint}")


def _policy_keys() -> set[str]:
    """The keys of all policies. They are looked up late, because a plug-in may add policies."""
    return {key for policy in POLICIES.classes().values() for key in policy.model_fields}


def _arm_policy(arm: Arm, own: dict[str, Any] | None, share: float | None) -> dict[str, Any] | None:
    """A stage's policy in an arm. If the plan does not prune a stage, no arm does."""
    given = {key: arm[key] for key in _policy_keys() & arm.keys()}
    if own is None or given.get("policy") == "none":
        return None
    if given.get("policy", own["policy"]) == own["policy"]:
        return own | given
    policy = POLICIES.classes().get(given["policy"])
    if policy is None or "keep" not in policy.model_fields:
        return given
    # The random control keeps exactly as many samples as the plan's policy did.
    keep = share if given["policy"] == RANDOM else own.get("keep", share)
    return {"keep": keep} | given

"""Registries of plug-ins: names, messages, plug-in modules, and the plan's schema."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import yaml
from pydantic import ValidationError

from secateur.errors import PlanError
from secateur.influence.optimizers import find_update_rule
from secateur.tasks.plan import CURVATURES, OPTIMIZERS, POLICIES, Plan
from secateur.tasks.plan.base import Config
from secateur.tasks.plan.plan_file import parse_plan, plan_schema, plan_text
from secateur.tasks.plan.registry import Registry
from secateur.tasks.training.optimizers import plan_update_rule
from tests.tasks.small import small_plan, values

NOWHERE = Path("/nowhere")
STAGE = {"steps": 4, "batch_size": 20}
REGISTRIES: list[Registry[Any]] = [POLICIES, CURVATURES, OPTIMIZERS]

# A policy, a curvature and an optimizer, as a user would write them in one module.
PLUGIN = """
from typing import Literal

import torch

from secateur.influence.curvature import NoCurvature
from secateur.tasks.plan import (
    CurvatureConfig, Fraction, OptimizerConfig, Policy,
    register_curvature, register_optimizer, register_policy,
)
from secateur.tasks.pruning.ranking import keep_best, rank_samples


@register_policy
class KeepFirst(Policy):
    policy: Literal["first"] = "first"
    keep: Fraction

    def decide(self, samples, context):
        ranked = rank_samples(samples, "sample", descending=False)
        return keep_best(ranked, self.keep, "row", self.policy)


@register_curvature
class Flat(CurvatureConfig):
    kind: Literal["flat"] = "flat"
    slope: float = 0.0

    def build(self, segment, spans):
        return NoCurvature(segment, spans)


@register_optimizer
class Slow(OptimizerConfig):
    kind: Literal["slow"] = "slow"
    optimizer_class = torch.optim.SGD
    linear = True
"""


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The name of a plug-in module that can be imported. Its classes are gone after the test."""
    (tmp_path / "my_plugin.py").write_text(PLUGIN)
    monkeypatch.syspath_prepend(str(tmp_path))
    for registry in REGISTRIES:
        monkeypatch.setattr(registry, "_classes", registry.classes())
    yield "my_plugin"
    sys.modules.pop("my_plugin", None)


class Shape(Config):
    """A base class of settings, for a registry of this module."""

    kind: str


@pytest.fixture
def shapes() -> Registry[Shape]:
    """A registry that holds a circle."""
    registry: Registry[Shape] = Registry(Shape, tag="kind", builtins=__name__)

    @registry.register
    class Circle(Shape):
        kind: Literal["circle"] = "circle"
        radius: float

    return registry


def test_a_duplicate_name_is_refused(shapes: Registry[Shape]) -> None:
    class Disk(Shape):
        kind: Literal["circle"] = "circle"

    with pytest.raises(PlanError, match=r"Circle and .*Disk both register the kind circle; rename"):
        shapes.register(Disk)
    assert [one.__name__ for one in shapes.classes().values()] == ["Circle"]


def test_an_equally_named_class_of_another_file_is_refused(shapes: Registry[Shape]) -> None:
    (circle,) = shapes.classes().values()
    names = {"__qualname__": circle.__qualname__, "__module__": json.__name__}
    with pytest.raises(PlanError, match=r"Circle and json\..*Circle both register the kind circle"):
        shapes.register(type("Circle", (circle,), names))
    assert shapes.classes() == {"circle": circle}


def test_a_class_may_be_registered_again_by_its_own_file(shapes: Registry[Shape]) -> None:
    """A file may be imported twice, as a script and as a module."""
    (circle,) = shapes.classes().values()
    names = {"__qualname__": circle.__qualname__, "__module__": circle.__module__}
    again = type("Circle", (circle,), names)
    shapes.register(again)
    assert shapes.classes() == {"circle": again}


def test_a_class_without_a_name_is_refused(shapes: Registry[Shape]) -> None:
    class Nameless(Shape):
        pass

    with pytest.raises(PlanError, match="Nameless has no default for `kind`"):
        shapes.register(Nameless)


def test_settings_are_read_as_the_class_that_they_name(shapes: Registry[Shape]) -> None:
    circle = shapes.parse({"kind": "circle", "radius": 2})
    assert circle.model_dump() == {"kind": "circle", "radius": 2.0}
    assert shapes.parse(circle) is circle


def test_errors_begin_with_the_name_of_the_class(shapes: Registry[Shape]) -> None:
    with pytest.raises(ValidationError) as raised:
        shapes.parse({"kind": "circle", "radius": "wide", "colour": "red"})
    assert [one["loc"] for one in raised.value.errors()] == [
        ("circle", "radius"),
        ("circle", "colour"),
    ]
    assert "wide" not in str(raised.value)  # a value may hold credentials


@pytest.mark.parametrize(
    ("changes", "registry", "where"),
    [
        ({"optimizer": {"kind": "adadelta", "lr": 0.1}}, OPTIMIZERS, r"`optimizer`"),
        ({"curvature": {"kind": "adadelta"}}, CURVATURES, r"`curvature`"),
        ({"stages": [STAGE | {"prune": {"policy": "adadelta"}}]}, POLICIES, r"`stages\.0\.prune`"),
    ],
)
def test_an_unknown_name_lists_the_registered_ones(
    changes: dict[str, Any], registry: Registry[Any], where: str
) -> None:
    names = ", ".join(f"'{name}'" for name in registry.names())
    with pytest.raises(PlanError, match=rf"{where}: Input tag 'adadelta' .*: {names}$") as raised:
        parse_plan(yaml.safe_dump(values(NOWHERE, **changes)), "plan.yaml")
    assert "\n" not in str(raised.value)


def test_the_built_in_names_are_known() -> None:
    """Keys that users write; a plan of an earlier version holds them."""
    assert set(POLICIES.names()) >= {
        "top", "threshold", "drop_harmful", "balanced", "random", "loss", "grand", "el2n", "tracin"
    }  # fmt: skip
    curvatures = {"empirical_fisher", "fisher", "gauss_newton", "hessian", "none"}
    assert set(CURVATURES.names()) >= curvatures
    assert set(OPTIMIZERS.names()) >= {"sgd", "adamw", "adam", "rmsprop"}


def test_a_plan_may_name_the_classes_of_a_plugin(plugin: str) -> None:
    changes = {
        "plugins": [plugin],
        "optimizer": {"kind": "slow", "lr": 0.1},
        "curvature": {"kind": "flat", "slope": 0.5},
        "stages": [STAGE | {"prune": {"policy": "first", "keep": 0.5}}],
    }
    plan = parse_plan(yaml.safe_dump(values(NOWHERE, **changes)), "plan.yaml")
    prune = plan.stages[0].prune
    assert prune is not None
    assert prune.model_dump() == {"policy": "first", "keep": 0.5}
    assert plan.curvature.model_dump()["slope"] == 0.5
    assert plan.optimizer.build([{"params": []}]) is not None
    assert parse_plan(plan_text(plan), "again") == plan
    changes["curvature"] = {"kind": "flat", "slop": 0.5}
    with pytest.raises(PlanError, match=r"unknown key `curvature\.slop`; did you mean `slope`\?"):
        parse_plan(yaml.safe_dump(values(NOWHERE, **changes)), "plan.yaml")


def test_a_plugin_that_cannot_be_imported_is_one_sentence() -> None:
    text = yaml.safe_dump(values(NOWHERE, plugins=["no_such_plugin"]))
    with pytest.raises(PlanError) as raised:
        parse_plan(text, "plan.yaml")
    assert str(raised.value) == (
        "the plan plan.yaml: `plugins`: the plug-in no_such_plugin cannot be imported "
        "(No module named 'no_such_plugin'); run from the folder that holds it, or install it"
    )


def test_a_missing_plugin_is_reported_before_the_names_that_it_would_register() -> None:
    changes = {"plugins": ["no_such_plugin"], "curvature": {"kind": "flat"}}
    with pytest.raises(PlanError, match=r"the plug-in no_such_plugin .* \(and 1 more\)"):
        parse_plan(yaml.safe_dump(values(NOWHERE, **changes)), "plan.yaml")


def test_a_plan_of_an_earlier_version_without_plugins_is_read() -> None:
    plan = small_plan(NOWHERE)
    stored = yaml.safe_load(plan_text(plan))
    del stored["plugins"]
    assert parse_plan(yaml.safe_dump(stored), "plan.yaml") == plan


def test_the_schema_lists_every_registered_class(plugin: str) -> None:
    Plan.model_validate(values(NOWHERE, plugins=[plugin]))
    schema = json.loads(plan_schema())
    fields: dict[str, tuple[Registry[Any], dict[str, Any]]] = {
        "optimizer": (OPTIMIZERS, schema["properties"]["optimizer"]),
        "curvature": (CURVATURES, schema["properties"]["curvature"]),
        "prune": (POLICIES, schema["$defs"]["StageConfig"]["properties"]["prune"]["anyOf"][0]),
    }
    for registry, field in fields.values():
        classes = registry.classes()
        mapping = field["discriminator"]["mapping"]
        assert field["discriminator"]["propertyName"] == registry.tag
        assert mapping == {name: f"#/$defs/{cls.__name__}" for name, cls in classes.items()}
        for cls in classes.values():
            properties = schema["$defs"][cls.__name__]["properties"]
            assert properties.keys() == cls.model_fields.keys()
    assert {"first", "flat", "slow"} <= {
        name for registry, _ in fields.values() for name in registry.names()
    }


@pytest.mark.parametrize("kind", OPTIMIZERS.names())
def test_an_optimizer_is_linear_if_its_update_rule_is(kind: str) -> None:
    """The plan chooses the basis by the first, and the recorder what it records by the second."""
    config = OPTIMIZERS.parse({"kind": kind, "lr": 0.1})
    assert config.linear is plan_update_rule(config).linear


@pytest.mark.parametrize(
    "settings",
    [
        *({"kind": kind} for kind in OPTIMIZERS.names()),
        {"kind": "sgd", "momentum": 0.9},
        {"kind": "rmsprop", "momentum": 0.9},
        {"kind": "rmsprop", "momentum": 0.9, "centered": True},
        {"kind": "adam", "amsgrad": True},
        {"kind": "adamw", "amsgrad": True},
        {"kind": "radam", "decoupled_weight_decay": True},
    ],
    ids=str,
)
def test_the_plans_update_rule_is_that_of_its_optimizer(settings: dict[str, Any]) -> None:
    config = OPTIMIZERS.parse({"lr": 0.1} | settings)
    planned = plan_update_rule(config)
    built = find_update_rule(config.build([{"params": [torch.ones(1)]}]))
    assert (type(planned), planned.slots) == (type(built), built.slots)


def test_an_update_rule_needs_no_compiler() -> None:
    """Building an optimizer imports torch's, which takes a second of `secateur plan`."""
    code = (
        "import sys; from secateur.tasks.training.optimizers import SGDConfig, plan_update_rule; "
        "plan_update_rule(SGDConfig(lr=0.1)); print('torch._dynamo' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"

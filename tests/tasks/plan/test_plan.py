"""Which plans are refused, and with which message."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from secateur.errors import PlanError
from secateur.tasks.plan import Plan
from secateur.tasks.plan.plan_file import parse_plan, plan_text, read_plan
from tests.tasks.small import small_plan, values


def plan_with(**changes: Any) -> str:
    """The small plan as YAML, with some of its keys replaced."""
    return yaml.safe_dump(values(Path("/nowhere"), **changes))


STAGE = {"steps": 4, "batch_size": 2}
OPTIMIZER = {"kind": "sgd", "lr": 0.1}


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"modle": 1}, r"unknown key `modle`; did you mean `model`\?"),
        (
            {"stages": [STAGE | {"batchsize": 2}]},
            r"unknown key `stages\.0\.batchsize`; did you mean `batch_size`\?",
        ),
        (
            {"optimizer": OPTIMIZER | {"momentun": 0.5}},
            r"`optimizer\.momentun`; did you mean `momentum`\?",
        ),
        (
            {"stages": [STAGE | {"prune": {"policy": "top", "keep": 0.5, "kep": 1}}]},
            r"`stages\.0\.prune\.kep`; did you mean `keep`\?",
        ),
        (
            {"basis": {"kind": "kronecker", "rnak": 4}},
            r"`basis\.rnak`; did you mean `rank`\?",
        ),
        ({"zzz": 1}, r"unknown key `zzz`; known keys are audit, autocast, basis"),
        (
            {"launch": {"shard": "fsdp"}},
            "`shard: fsdp` divides a model among several processes; set `processes` to 2 or more",
        ),
        (
            {"launch": {"processes": 2}, "curvature": {"kind": "hessian"}},
            r"`curvature\.kind: hessian` makes passes that only one process can make",
        ),
        (
            {"launch": {"processes": 2}, "device": "cuda:1"},
            "`device: cuda:1` is one device, and `launch` has 2 processes; set `device: cuda`",
        ),
        (
            {"launch": {"processes": 2}, "stages": [STAGE | {"windows": [{"select": {}}]}]},
            "online selection works in one process; leave out the windows' `select`",
        ),
        (
            {"stages": [STAGE | {"windows": [{"strat": 0.0}]}]},
            r"windows\.0\.strat`; did you mean `start`\?",
        ),
        ({"stages": []}, "`stages`: List should have at least 1 item"),
        ({"stages": [{"batch_size": 2}]}, "a stage has either `epochs` or `steps`"),
        ({"stages": [STAGE | {"epochs": 1}]}, "a stage has either `epochs` or `steps`"),
        ({"stages": [STAGE | {"accumulate": 3}]}, "batch_size 2 is not a multiple of accumulate 3"),
        (
            {"stages": [STAGE | {"windows": [{"start": 0.5, "stop": 1.5}]}]},
            "lies outside its stage",
        ),
        ({"stages": [STAGE | {"windows": [{"start": 0.5, "stop": 0.5}]}]}, "is empty"),
        (
            {"stages": [STAGE | {"prune": {"policy": "best"}}]},
            "'balanced', 'loss', 'grand', 'el2n', 'tracin', 'top', 'threshold', "
            "'drop_harmful', 'random'",
        ),
        ({"stages": [STAGE | {"prune": {"policy": "top", "keep": 0}}]}, "greater than 0"),
        ({"score": {"target": "other"}}, "score.target other is none of the targets clean"),
        ({"targets": {}}, "`targets`"),
        ({"seed": -1}, "`seed`"),
        ({"run": "a/b"}, "`run`"),
        ({"model": {"factory": "os.system"}}, "`model.factory`"),
        ({"optimizer": {"kind": "adadelta", "lr": 0.1}}, "'radam', 'adagrad', 'rmsprop'"),
        ({"optimizer": {"lr": 0.1}}, "`optimizer` needs `kind`"),
        ({"optimizer": OPTIMIZER | {"nesterov": True}}, "`nesterov` needs a `momentum` above 0"),
        ({"optimizer": {"kind": "adamw", "lr": 0.1}}, "a kronecker basis cannot follow adamw"),
        ({"curvature": {"kind": "none", "every": 2}}, r"unknown key `curvature\.every`"),
        (
            {"schedule": {"over": "run"}, "stages": [{"epochs": 1, "batch_size": 2}]},
            "a schedule over the run needs `steps`",
        ),
    ],
)
def test_a_wrong_plan_is_one_sentence(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(PlanError, match=sentence) as raised:
        parse_plan(plan_with(**changes), "plan.yaml")
    assert str(raised.value).startswith("the plan plan.yaml")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("text", ["", "- 1", "a: [", "!!python/object/apply:os.system ['true']"])
def test_text_that_is_not_a_mapping_is_refused(text: str) -> None:
    with pytest.raises(PlanError, match=r"the plan p\.yaml"):
        parse_plan(text, "p.yaml")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"nothing\.yaml cannot be read"):
        read_plan(str(tmp_path / "nothing.yaml"))


def test_a_plan_is_read_back_from_its_own_text() -> None:
    plan = small_plan(Path("/nowhere"))
    assert parse_plan(plan_text(plan), "again") == plan


def test_the_schema_in_docs_is_up_to_date() -> None:
    # Another process prints it, because plug-ins of other tests may be registered in this one.
    code = "from secateur.tasks.plan.plan_file import plan_schema; print(plan_schema(), end='')"
    schema = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout
    message = "run `secateur schema > docs/plan.schema.json`"
    assert Path("docs/plan.schema.json").read_text() == schema, message


@pytest.mark.parametrize("path", ["examples/images/plan.yaml", "examples/text/plan.yaml"])
def test_the_plans_of_the_examples_are_valid(path: str) -> None:
    assert isinstance(read_plan(path), Plan)

"""What stands beside the code keeps its promises: the README's code runs, deployments name flows that exist."""

from __future__ import annotations

import importlib
import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

README = Path("README.md").read_text()


@pytest.mark.parametrize("code", re.findall(r"```python\n(.*?)```", README, re.DOTALL))
def test_the_readmes_code_runs(code: str, capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(code, "README.md", "exec"), {})
    assert "print" not in code or "the sample that helped" in capsys.readouterr().out


def test_the_readmes_plan_is_a_plan() -> None:
    from secateur.tasks.plan.plan_file import parse_plan

    (text,) = re.findall(r"```yaml\n(.*?)```", README, re.DOTALL)
    assert [stage.batch_size for stage in parse_plan(text, "README.md").stages] == [32, 32]


@pytest.mark.parametrize(
    "deployment",
    yaml.safe_load(Path("prefect.yaml").read_text())["deployments"],
    ids=lambda d: d["entrypoint"],
)
def test_deployments_name_flows_and_their_parameters(deployment: dict[str, Any]) -> None:
    path, name = deployment["entrypoint"].split(":")
    flow = getattr(importlib.import_module(path.removesuffix(".py").replace("/", ".")), name)
    known = inspect.signature(flow.fn).parameters
    given = [
        deployment.get("parameters", {}),
        *(t["parameters"] for t in deployment.get("triggers", [])),
    ]
    assert all(key in known for parameters in given for key in parameters)


def test_every_key_of_the_plan_is_documented() -> None:
    from secateur.tasks.plan import Plan

    text = Path("docs/plan.md").read_text()

    def names(schema: dict[str, Any]) -> set[str]:
        found = {key for part in schema["$defs"].values() for key in part.get("properties", {})}
        return found | set(schema["properties"])

    missing = [name for name in names(Plan.model_json_schema()) if name not in text]
    assert missing == []


def test_every_promise_names_tests_and_benchmarks_that_exist() -> None:
    text = Path("docs/guarantees.md").read_text()
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", text)
    missing = [
        f"{path}::{name}"
        for path, name in named
        if not re.search(rf"^def {name}\(", Path(path).read_text(), re.M)
    ]
    assert missing == []
    assert len(named) > 50
    assert all(
        Path(f"benchmarks/{name}.py").exists() for name in re.findall(r"`benchmarks\.(\w+)`", text)
    )


def test_no_pickle_is_loaded_anywhere() -> None:
    loading = re.compile(r"\bpickle\b|torch\.load\(|allow_pickle|(?<!\.)\beval\(|yaml\.load\(")
    rooms = ("secateur", "storage", "tasks", "flows")
    hits = [
        str(p) for room in rooms for p in Path(room).rglob("*.py") if loading.search(p.read_text())
    ]
    assert hits == []

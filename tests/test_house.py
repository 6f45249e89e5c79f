"""The README, the docs and the deployments agree with the code."""

from __future__ import annotations

import importlib
import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from secateur.tasks.plan import Plan

README = Path("README.md")
PAGES = [README, *sorted(Path("docs").rglob("*.md"))]


def test_the_readmes_code_prints_the_output_below_it(capsys: pytest.CaptureFixture[str]) -> None:
    ((code, output),) = re.findall(
        r"```python\n(.*?)```\s*```text\n(.*?)```", README.read_text(), re.DOTALL
    )
    exec(compile(code, README, "exec"), {})
    assert "helped most" in output
    assert capsys.readouterr().out == output


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_links_of_the_pages_lead_to_files(page: Path) -> None:
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text())
    paths = [link for link in links if not link.startswith(("http://", "https://", "mailto:"))]
    assert [path for path in paths if not (page.parent / path).exists()] == []


@pytest.mark.parametrize(
    "deployment",
    yaml.safe_load(Path("prefect.yaml").read_text())["deployments"],
    ids=lambda deployment: deployment["entrypoint"],
)
def test_deployments_name_flows_and_parameters_that_exist(deployment: dict[str, Any]) -> None:
    path, name = deployment["entrypoint"].split(":")
    flow = getattr(importlib.import_module(path.removesuffix(".py").replace("/", ".")), name)
    known = inspect.signature(flow.fn).parameters
    triggers = deployment.get("triggers", [])
    named = [deployment.get("parameters", {}), *(one["parameters"] for one in triggers)]
    assert all(key in known for parameters in named for key in parameters)


def test_every_key_of_the_plan_is_documented() -> None:
    text = Path("docs/plan.md").read_text()
    schema = Plan.model_json_schema()
    keys = {key for part in schema["$defs"].values() for key in part.get("properties", {})}
    keys |= set(schema["properties"])
    assert len(keys) > 60
    assert [key for key in sorted(keys) if key not in text] == []


def test_every_guarantee_names_tests_and_benchmarks_that_exist() -> None:
    text = Path("docs/guarantees.md").read_text()
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", text)
    missing = [
        f"{path}::{name}"
        for path, name in named
        if not re.search(rf"^def {name}\(", Path(path).read_text(), re.M)
    ]
    assert missing == []
    assert len(named) > 50
    benchmarks = re.findall(r"`benchmarks\.(\w+)`", text)
    assert [name for name in benchmarks if not Path(f"benchmarks/{name}.py").exists()] == []
    assert benchmarks


def test_no_pickle_is_loaded_anywhere() -> None:
    loading = re.compile(r"\bpickle\b|torch\.load\(|allow_pickle|(?<!\.)\beval\(|yaml\.load\(")
    # The last three are linked from the package, and rglob does not follow links.
    folders = ("secateur", "storage", "tasks", "flows")
    paths = [path for folder in folders for path in Path(folder).rglob("*.py")]
    assert len(paths) > 120
    assert [str(path) for path in paths if loading.search(path.read_text())] == []

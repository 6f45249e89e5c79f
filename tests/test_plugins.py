"""Plug-ins from outside the package: a policy, a curvature, an optimizer and a layer in a plan."""

from __future__ import annotations

import ast
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
import yaml

from secateur.errors import PlanError
from secateur.influence.optimizers import find_update_rule
from secateur.tasks.plan import CURVATURES, OPTIMIZERS, POLICIES, Plan
from secateur.tasks.results.pruning_results import read_decisions
from secateur.tasks.run import Run
from tests.tasks.small import curate_small, make_data, values

PLUGIN = Path("tests/plugin_example.py")


@pytest.fixture(autouse=True)
def plugin_example() -> Iterator[Any]:
    """The plug-in's module. What it registers is gone after the test."""
    registered = {registry: registry.classes() for registry in (POLICIES, CURVATURES, OPTIMIZERS)}
    sys.modules.pop("tests.plugin_example", None)
    yield importlib.import_module("tests.plugin_example")
    for registry, classes in registered.items():
        registry._classes = classes


def plugin_values(folder: Path, plugin: str) -> dict[str, Any]:
    """The keys of a plan that uses everything that the plug-in registers."""
    stage = {"steps": 7, "batch_size": 20, "prune": {"policy": "surprising", "keep": 0.5}}
    return values(
        folder,
        plugins=[plugin],
        model={"factory": f"{plugin}:network"},
        optimizer={"kind": "soft_sign", "lr": 0.05},
        curvature={"kind": "damping", "damping": 0.2},
        basis={"kind": "coordinates", "numbers": 64, "fit_steps": 1},
        stages=[stage, {"steps": 3, "batch_size": 20}],
    )


def test_a_plan_uses_a_plug_in(tmp_path: Path, plugin_example: Any) -> None:
    make_data(tmp_path)
    run = curate_small(Plan.model_validate(plugin_values(tmp_path, "tests.plugin_example")))
    decisions = read_decisions(run, 0)
    kept = decisions.filter("keep")["loss"]
    dropped = decisions.filter(~pl.col("keep"))["loss"]
    assert kept.min() >= dropped.max()  # type: ignore[operator]
    assert len(kept) == len(dropped)
    assert "2.weight" in run.folder.basis.manifest.facts["blocks"]
    assert Run.open(run.url).plan.curvature == plugin_example.DampingConfig(damping=0.2)


def test_the_command_line_uses_a_plug_in_in_the_users_folder(tmp_path: Path) -> None:
    """A single file in the working folder is all that a user adds."""
    make_data(tmp_path)
    (tmp_path / "my_plugin.py").write_text(PLUGIN.read_text())
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(plugin_values(tmp_path, "my_plugin")))
    root = str(Path.cwd())

    def secateur(*words: str) -> dict[str, Any]:
        done = subprocess.run(
            [sys.executable, "-m", "secateur.flows.cli", *words, "--json"],
            cwd=tmp_path,
            env=_environment(root),
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        result: dict[str, Any] = json.loads(done.stdout)
        return result

    secateur("run", "plan.yaml")
    words = ("--stage", "1", "--policy", "surprising", "--keep", "0.25")
    again = secateur("prune", "runs/small", *words)
    assert again["name"] == "surprising-0.25"
    # 3 steps of 20 used 60 of the 70 samples; the others are kept, as nothing is known of them.
    assert (again["kept"], again["dropped"]) == (15 + 10, 45)


def _environment(root: str) -> dict[str, str]:
    # The plug-in's file is found in the working folder; `tests` (the task) in the repository.
    return os.environ | {"PYTHONPATH": root}


def test_the_plug_ins_update_rule_is_the_optimizers_update(plugin_example: Any) -> None:
    parameter = torch.nn.Parameter(torch.linspace(-1, 1, 5))
    before = parameter.detach().clone()
    optimizer = plugin_example.SoftSign([parameter], lr=0.1, weight_decay=0.01)
    parameter.grad = torch.linspace(2, -3, 5)
    rule = find_update_rule(optimizer)
    hyper = {"lr": torch.tensor(0.1), "weight_decay": torch.tensor(0.01)}
    predicted = rule.update(before[None], parameter.grad.clone(), hyper)[0]
    optimizer.step()
    torch.testing.assert_close(parameter.detach(), predicted)


@pytest.mark.parametrize(
    ("ruling", "sentence"),
    [
        (lambda samples: samples, "returned no column keep"),
        (lambda samples: _keep_all(samples).head(3), "returned 3 rows for 140 samples"),
        (lambda samples: _keep_all(samples).with_columns(rank=pl.lit("first")), "wrong type"),
    ],
    ids=["no decision", "samples left out", "wrong type"],
)
def test_a_policy_that_rules_wrongly_is_refused(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    plugin_example: Any,
    ruling: Callable[[pl.DataFrame], pl.DataFrame],
    sentence: str,
) -> None:
    make_data(tmp_path)
    monkeypatch.setattr(
        plugin_example.KeepSurprising, "decide", lambda self, samples, context: ruling(samples)
    )
    plan = Plan.model_validate(plugin_values(tmp_path, "tests.plugin_example"))
    with pytest.raises(PlanError, match=sentence):
        curate_small(plan)


def _keep_all(samples: pl.DataFrame) -> pl.DataFrame:
    return samples.with_columns(keep=True, reason=pl.lit("kept: all"), rank=1)


@pytest.mark.parametrize(
    "names",
    [{"BalancedPolicy"}, {"HessianConfig", "Hessian"}, {"RMSpropConfig", "RMSpropUpdate"}],
    ids=["policy", "curvature", "optimizer"],
)
def test_adding_one_to_the_package_touches_at_most_two_files(names: set[str]) -> None:
    """Counted on built-in ones: the files of the package that define or import them."""
    touched = set()
    for folder in ("flows", "tasks", "storage", "secateur/influence"):
        for path in Path(folder).rglob("*.py"):
            nodes = ast.walk(ast.parse(path.read_text()))
            defined = {node.name for node in nodes if isinstance(node, ast.ClassDef)}
            nodes = ast.walk(ast.parse(path.read_text()))
            imported = {node.name for node in nodes if isinstance(node, ast.alias)}
            if names & (defined | imported):
                touched.add(str(path))
    assert 1 <= len(touched) <= 2, touched

"""The package as it is installed: its names, what importing it costs, and what it depends on."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

import secateur

PROJECT = tomllib.loads(Path("pyproject.toml").read_text())["project"]
ROOMS = ("flows", "tasks", "storage", "secateur/influence", "secateur/text")


def sources() -> list[Path]:
    """Every module of the package."""
    modules = [path for room in ROOMS for path in Path(room).rglob("*.py")]
    return [*modules, *Path("secateur").glob("*.py")]


def runtime_imports(path: Path) -> set[str]:
    """The top-level names that a module imports, except for type checkers only."""
    names = set()
    nodes: list[ast.AST] = [ast.parse(path.read_text())]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names.add(node.module.split(".")[0])
        nodes.extend(ast.iter_child_nodes(node))
    return names


def test_the_wheel_has_one_top_level_name(tmp_path: Path) -> None:
    command = ["pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", str(tmp_path)]
    subprocess.run([sys.executable, "-m", *command, "."], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {"secateur", "secateur-0.1.0.dist-info"}
    for name in ("py.typed", "flows/cli.py", "tasks/reporting/report.html.j2", "storage/folder.py"):
        assert f"secateur/{name}" in names


def test_eight_to_twelve_public_names_that_exist() -> None:
    assert 8 <= len(secateur.__all__) <= 12
    assert all(callable(getattr(secateur, name)) for name in secateur.__all__)
    assert secateur.__version__ == PROJECT["version"]
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = secateur.nothing


def test_importing_the_package_imports_nothing_else() -> None:
    code = "import sys, secateur; print(*{name.split('.')[0] for name in sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) & {"torch", "prefect", "polars", "pydantic"} == set()
    code = f"import sys, secateur.text, secateur.huggingface; {code}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    heavy = {"transformers", "tokenizers", "peft", "prefect", "polars", "pydantic"}
    assert set(done.stdout.split()) & heavy == set()


def test_all_that_is_imported_is_declared() -> None:
    extras = [line for lines in PROJECT["optional-dependencies"].values() for line in lines]
    declared = {
        re.match(r"[\w-]+", line)[0].lower().replace("_", "-")  # type: ignore[index]
        for line in [*PROJECT["dependencies"], *extras]
    }
    imported = set().union(*map(runtime_imports, sources()))
    third_party = imported - set(sys.stdlib_module_names) - {"secateur"}
    distributions = packages_distributions()
    missing = {
        name
        for name in third_party
        if not {d.lower().replace("_", "-") for d in distributions.get(name, [name])} & declared
    }
    assert missing == set()


def test_settings_classes_are_named_apart_from_mathematics() -> None:
    """No class of the plan has the name of a class of the mathematics."""

    def classes(folder: str) -> set[str]:
        nodes = [n for p in Path(folder).rglob("*.py") for n in ast.walk(ast.parse(p.read_text()))]
        return {node.name for node in nodes if isinstance(node, ast.ClassDef)}

    assert classes("tasks/plan") & classes("secateur/influence") == set()

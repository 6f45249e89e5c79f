"""The tutorial as a reader follows it: its commands in order, its code and its plan."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from secateur.tasks.plan.plan_file import parse_plan

TUTORIAL = Path("docs/tutorial.md").read_text()


def blocks(language: str) -> list[str]:
    """The code blocks of a language, without indentation."""
    return re.findall(rf"```{language}\n(.*?)```", TUTORIAL, re.DOTALL)


def test_the_tutorials_plan_is_a_plan() -> None:
    (text,) = blocks("yaml")
    assert [stage.batch_size for stage in parse_plan(text, "tutorial").stages] == [32, 32]


def test_the_tutorials_code_runs() -> None:
    (code,) = blocks("python")
    exec(compile(code, "docs/tutorial.md", "exec"), {})


@pytest.mark.slow
def test_the_tutorials_commands_run_in_order(tmp_path: Path) -> None:
    (tmp_path / "examples").symlink_to(Path("examples").resolve())
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    path = f"{Path(sys.executable).parent}{os.pathsep}{clean['PATH']}"
    environment = clean | {"PATH": path, "PREFECT_HOME": str(tmp_path / "prefect")}
    printed = {}
    for command in blocks("sh"):
        done = subprocess.run(
            ["bash", "-ec", command],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=600,
        )
        assert done.returncode == 0, f"{command}\n{done.stderr}"
        assert "Traceback" not in done.stderr
        printed[" ".join(command.split()[:2])] = done.stdout
    assert len(printed) == 6  # the two queries share a key
    assert "1152 top: score not among the best 0.7" in printed["secateur run"]
    assert printed["secateur prune"].count("shards/train-") == 4
    assert printed["secateur query"].count("train-") >= 5
    assert "as it was committed" in printed["secateur verify"]
    losses = re.findall(r"│ [01] .*│ +([\d.]+) +│\n", printed["secateur run"])
    assert float(losses[1]) < 0.7 * float(losses[0])

"""The examples as a user runs them, in a folder of their own."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest


def example(folder: Path, name: str) -> str:
    """What an example prints."""
    (folder / "examples").symlink_to(Path("examples").resolve())
    done = subprocess.run(
        [sys.executable, "-m", f"examples.{name}.run"],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout


def losses(text: str, run: str) -> list[float]:
    """The last column of a run's rows in the closing table: the loss on the test target at each stage's end."""
    rows = [line.split("│") for line in text.splitlines() if re.match(rf"│ {run} +│ \d", line)]
    return [float(row[-2]) for row in rows]


@pytest.mark.slow
def test_images(tmp_path: Path) -> None:
    text = example(tmp_path, "images")
    found = re.search(r"wrong labels: random (\S+), systematic (\S+)", text)
    assert found
    assert min(map(float, found.groups())) > 0.9
    pruned, control = losses(text, "images"), losses(text, "images-random")
    assert pruned[0] == control[0]
    assert pruned[1] < control[1] - 0.1
    assert text.count("train-") == 10


@pytest.mark.slow
def test_text(tmp_path: Path) -> None:
    text = example(tmp_path, "text")
    kept = {
        domain: int(count)
        for domain, count in re.findall(r"^(\w+): (\d+) of 800 kept", text, re.MULTILINE)
    }
    assert kept["manual"] > 1.5 * max(kept["code"], kept["tables"])
    assert losses(text, "text")[1] < losses(text, "text-random")[1]

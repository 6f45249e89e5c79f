"""The examples, run as a user runs them, each in a folder of its own."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest


def run_example(folder: Path, name: str) -> str:
    """Run an example, and return what it prints."""
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


def read_losses(text: str, run: str) -> list[float]:
    """Read the test target's loss at each stage's end: the last column of the final table."""
    rows = [line.split("│") for line in text.splitlines() if re.match(rf"│ {run} +│ \d", line)]
    return [float(row[-2]) for row in rows]


@pytest.mark.slow
def test_the_images_example_finds_wrong_labels_and_lowers_the_loss(tmp_path: Path) -> None:
    text = run_example(tmp_path, "images")
    found = re.search(r"wrong labels: random (\S+), systematic (\S+)", text)
    assert found
    assert min(map(float, found.groups())) > 0.9
    pruned = read_losses(text, "images")
    control = read_losses(text, "images-random")
    assert pruned[0] == control[0]
    assert pruned[1] < control[1] - 0.1
    assert text.count("train-") == 10


@pytest.mark.slow
def test_the_text_example_keeps_the_helpful_domain(tmp_path: Path) -> None:
    text = run_example(tmp_path, "text")
    kept = {
        domain: int(count)
        for domain, count in re.findall(r"^(\w+): (\d+) of 800 kept", text, re.MULTILINE)
    }
    assert kept["manual"] > 1.5 * max(kept["code"], kept["tables"])
    assert read_losses(text, "text")[1] < read_losses(text, "text-random")[1]

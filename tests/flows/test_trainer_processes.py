"""Hugging Face's Trainer in two processes writes the ledger of one."""

from __future__ import annotations

from pathlib import Path

import pytest

from secateur.tasks.plan.plan_file import plan_text
from secateur.tasks.run import Run
from tests.flows import gpt
from tests.tasks.ranks import ledger_distance, torchrun


@pytest.mark.slow
def test_two_processes_write_the_ledger_of_one(tmp_path: Path) -> None:
    """With accumulation, clipping, and losses that are means over the tokens of all processes."""
    gpt.make_data(tmp_path)
    runs = []
    for processes, size, parts in ((1, 4, 2), (2, 4, 1), (2, 2, 2)):
        plan = gpt.make_plan(tmp_path, run=f"gpt-{processes}-{parts}", dtype="float64")
        path = tmp_path / f"{plan.run}.yaml"
        path.write_text(plan_text(plan))
        torchrun(processes, "tests.flows.trainer_loop", str(path), str(size), str(parts))
        runs.append(Run.of_plan(plan))
    one, two, two_accumulated = runs
    assert ledger_distance(one, two) < 1e-5
    # Each process has every other micro-batch of two, so their records are in another order.
    assert ledger_distance(one, two_accumulated, in_order=False) < 1e-5

"""The code of docs/processes.md runs, in two processes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from secateur.storage.ledger import read_ledger
from secateur.tasks.plan.plan_file import plan_text
from secateur.tasks.run import Run
from tests.tasks.ranks import torchrun
from tests.tasks.small import make_data, small_plan

# What the page's code takes as given.
GIVEN = """
import os
os.chdir({folder!r})
from tests.tasks.digits import network
from tests.tasks.small import sample
import numpy as np

def make_model():
    torch.manual_seed(0)
    return network(dropout=0.0)

def batches(rank, size):
    for start in range(0, 80, 20):
        samples = [sample(number) for number in range(start, start + 20)][rank::size]
        x = np.stack([np.frombuffer(one["raw"], np.float32) for one in samples])
        y = [int(one["cls"]) for one in samples]
        yield [one["__key__"] for one in samples], torch.tensor(x), torch.tensor(y)
"""


@pytest.mark.slow
def test_its_code_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = re.findall(
        r"^```python\n(.*?)^```", Path("docs/processes.md").read_text(), re.MULTILINE | re.DOTALL
    )
    make_data(tmp_path)
    model = {"factory": "tests.tasks.digits:network", "args": {"dropout": 0.0}}
    stages = [{"steps": 4, "batch_size": 20}, {"steps": 4, "batch_size": 20}]
    adamw = {"kind": "adamw", "lr": 0.001}
    plan = small_plan(tmp_path, stages=stages, model=model, optimizer=adamw, basis=None)
    (tmp_path / "plan.yaml").write_text(plan_text(plan))
    (tmp_path / "train.py").write_text("import torch\n" + GIVEN.format(folder=str(tmp_path)) + code)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{Path.cwd()}")
    torchrun(2, "train")
    ledger, _ = read_ledger(Run.of_plan(plan).folder.stage(0).segment(0))
    assert ledger["steps"].tolist() == [step for step in range(4) for _ in range(20)]
    # Rank 0's samples, then rank 1's.
    assert len(set(ledger["samples"].tolist())) == 80
    torch.testing.assert_close(ledger["weights"], torch.full((80,), 1 / 20).double())

"""The package works beside modules of a user that are named as its folders, and imports little."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.tasks.small import make_data, values

# Importing one of these is an error, so the tests notice it.
MODULES = ("flows/__init__.py", "tasks.py", "storage.py")
TRAP = 'raise RuntimeError("the user\'s own module was imported")\n'

LEARNING = """
import torch
from torch import nn
from torch.nn import functional

class Digits:
    def collate(self, samples):
        pixels = [torch.frombuffer(bytearray(s["raw"]), dtype=torch.float32) for s in samples]
        return {"x": torch.stack(pixels), "y": torch.tensor([int(s["cls"]) for s in samples])}

    def losses(self, model, batch):
        return functional.cross_entropy(model(batch["x"]), batch["y"], reduction="none")

def network():
    return nn.Sequential(nn.Linear(64, 12), nn.Tanh(), nn.Linear(12, 10))
"""
RECORD = """
import sys

import torch
import webdataset

from learning import Digits, network
from secateur import Recording

plan, *shards = sys.argv[1:]
samples = list(webdataset.WebDataset(shards, shardshuffle=False))
torch.manual_seed(0)
model, task = network(), Digits()
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
recording = Recording(plan, 0, model, optimizer)
recording.prepare()
recording.begin()
for step in range(4):
    chosen = samples[20 * step : 20 * step + 20]
    optimizer.zero_grad()
    with recording.batch([sample["__key__"] for sample in chosen]) as batch:
        losses = task.losses(model, task.collate(chosen))
        batch.losses = losses
        losses.mean().backward()
    optimizer.step()
"""
FINISH = """
result = recording.finish()
recording.close()
print(result.steps, result.by)
"""
PRINT_MODULES = """
import json
print(json.dumps(sorted({name.partition(".")[0] for name in sys.modules})))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's folder with traps, data, plans, and the module of a model and a learning task."""
    folder = tmp_path_factory.mktemp("user")
    (folder / "flows").mkdir()
    for name in MODULES:
        (folder / name).write_text(TRAP)
    make_data(folder)
    (folder / "learning.py").write_text(LEARNING)
    stages = [
        {"steps": 4, "batch_size": 20, "prune": {"policy": "top", "keep": 0.5}},
        {"steps": 2, "batch_size": 20},
    ]
    for run in ("small", "recorded", "modules"):
        plan = values(
            Path("."),
            run=run,
            stages=stages,
            model={"factory": "learning:network"},
            task={"factory": "learning:Digits"},
            optimizer={"kind": "sgd", "lr": 0.1},
        )
        (folder / f"{run}.yaml").write_text(yaml.safe_dump(plan))
    return folder


def run_python(folder: Path, *words: str) -> str:
    """Run Python in a folder, and return what it prints."""
    clean = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("PREFECT_") or name == "PREFECT_HOME"
    }
    done = subprocess.run(
        [sys.executable, *words],
        cwd=folder,
        env=clean,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout


def test_the_traps_would_be_imported(folder: Path) -> None:
    """Otherwise the other tests would show nothing."""
    for name in ("flows", "tasks", "storage"):
        with pytest.raises(AssertionError, match="the user's own module was imported"):
            run_python(folder, "-c", f"import {name}")


def test_the_commands_work(folder: Path) -> None:
    command = ("-m", "secateur.flows.cli")
    estimate = json.loads(run_python(folder, *command, "plan", "small.yaml", "--json"))
    assert [stage["samples"] for stage in estimate["stages"]] == [140, 70]
    summary = json.loads(run_python(folder, *command, "run", "small.yaml", "--json"))
    assert [stage["samples"] for stage in summary] == [140, summary[0]["pruned"]["kept"]]
    question = ("query", "runs/small", "--target", "clean", "--top", "3", "--json")
    hits = json.loads(run_python(folder, *command, *question))["hits"]
    assert [hit["rank"] for hit in hits] == [1, 2, 3]


def test_a_training_script_records(folder: Path) -> None:
    script = folder / "train.py"
    script.write_text(RECORD + FINISH)
    printed = run_python(folder, "train.py", "recorded.yaml", "train-0.tar", "train-1.tar")
    assert printed == "4 outside\n"
    assert (folder / "runs/recorded/stages/00/trained/manifest.json").exists()


def test_recording_imports_little(folder: Path) -> None:
    """A training script waits for its imports, so what most recordings never need comes late."""
    script = folder / "modules.py"
    script.write_text(RECORD + PRINT_MODULES + FINISH)
    printed = run_python(folder, "modules.py", "modules.yaml", "train-0.tar", "train-1.tar")
    names, result = printed.splitlines()
    assert result == "4 outside"
    modules = set(json.loads(names))
    assert {"torch", "polars", "secateur"} < modules
    assert not modules & {"matplotlib", "faiss", "scipy", "ruptures", "prefect"}

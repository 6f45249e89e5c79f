"""The memory that `secateur plan` foretells, against counts of real passes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from secateur.influence.memory_meter import measure_peak
from secateur.tasks.data.samples import list_target_samples
from secateur.tasks.reporting.dry_run import estimate_run
from secateur.tasks.reporting.pass_memory import PassMemory
from secateur.tasks.training.loop import TrainingLoop
from tests.tasks.small import Digits, curate_small, make_data, small_plan

WIDE = {"factory": "tests.tasks.small:network", "args": {"width": 10**7}}
COORDINATES = {
    "optimizer": {"kind": "adamw", "lr": 0.01},
    "basis": {"kind": "coordinates", "numbers": 100},
}


class Curious(Digits):
    """A task whose losses look at values, as shapes alone do not allow."""

    def losses(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        assert float(batch["x"].max()) <= 1
        return super().losses(model, batch)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("forecast")
    make_data(path)
    return path


@pytest.mark.parametrize("changes", [{}, COORDINATES])
def test_a_recorded_pass_counts_as_much_without_data(folder: Path, changes: dict[str, Any]) -> None:
    stages = [{"steps": 6, "batch_size": 20}]
    run = curate_small(small_plan(folder, run=f"real-{len(changes)}", stages=stages, **changes))
    samples = list_target_samples(run, "clean")
    loop = TrainingLoop(run, 0, samples)
    recorder = loop.recorder()

    def step() -> None:
        with recorder.batch(torch.arange(20)):
            losses = loop.task.losses(loop.model, loop.batch(torch.arange(20)))
            losses.mean().backward()

    step()
    loop.optimizer.zero_grad()
    passes = PassMemory(run)
    foretold = passes.training(samples, 20, repeat=False)
    assert passes.extrapolated is None
    batch = sum(tensor.nbytes for tensor in loop.batch(torch.arange(20)).values())
    assert foretold == pytest.approx(measure_peak(step) + batch, rel=0.1)


def test_a_model_that_does_not_fit_is_foretold_without_making_it(folder: Path) -> None:
    """Its weights alone would take 3 GB."""
    estimate = estimate_run(small_plan(folder, run="wide", model=WIDE, **COORDINATES))
    assert estimate.extrapolated is None
    training = next(part for part in estimate.memory if part.part == "training")
    # Weights, gradients, two slots, and a copy of weights and slots for the checkpoint.
    assert training.peak > 7 * 4 * estimate.parameters


def test_a_task_that_looks_at_values_is_measured_on_two_samples(folder: Path) -> None:
    without = estimate_run(small_plan(folder, run="shapes"))
    task = {"factory": f"{__name__}:Curious"}
    found = estimate_run(small_plan(folder, run="values", task=task))
    assert found.extrapolated
    assert without.extrapolated is None
    for part, other in zip(found.memory, without.memory, strict=True):
        assert part.part == other.part
        assert part.peak == pytest.approx(other.peak, rel=0.15)

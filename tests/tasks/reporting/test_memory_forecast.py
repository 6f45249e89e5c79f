"""The memory that `secateur plan` foretells, against counts of real passes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from secateur.influence.gauss_newton import compute_gauss_newton
from secateur.influence.hessian import compute_hessian
from secateur.influence.memory_meter import measure_peak
from secateur.influence.recursion import identity_transition, walk_segment
from secateur.tasks.data.samples import list_target_samples, read_stage_samples
from secateur.tasks.reporting.dry_run import estimate_run
from secateur.tasks.reporting.pass_memory import PassMemory
from secateur.tasks.results.valuation_results import coupled_spans
from secateur.tasks.run import Run
from secateur.tasks.training.loop import TrainingLoop
from secateur.tasks.valuation.dynamics import count_slots, plan_dynamics, read_segment
from tests.tasks.digits import Digits
from tests.tasks.small import curate_small, make_data, small_plan

WIDE = {"factory": "tests.tasks.digits:network", "args": {"width": 10**7}}
COORDINATES = {
    "optimizer": {"kind": "adamw", "lr": 0.01},
    "basis": {"kind": "coordinates", "numbers": 100},
}


class Layered(nn.Module):
    """A classifier with a list of layers, which FSDP2 divides one by one."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(500, 500) for _ in range(3))
        self.first = nn.Linear(64, 500)
        self.last = nn.Linear(500, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for layer in self.layers:
            x = layer(x).tanh()
        return self.last(x)


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


@pytest.mark.parametrize("coupling", ["block", "full"])
@pytest.mark.parametrize("kind", ["hessian", "gauss_newton"])
def test_a_curvatures_products_count_as_much_as_they_take(
    folder: Path, kind: str, coupling: str
) -> None:
    curvature = {"kind": kind, "every": 4, "coupling": coupling}
    run = curate_small(
        small_plan(
            folder,
            run=f"{kind}-{coupling}",
            curvature=curvature,
            stages=[{"steps": 6, "batch_size": 20}],
        )
    )
    samples = read_stage_samples(run, 0)
    loop = TrainingLoop(run, 0, samples)
    batch = loop.batch(torch.arange(20))
    basis = run.basis(run.bindings(loop.model))
    spans = basis.spans if coupling == "block" else [slice(0, basis.size)]
    widths = [span.stop - span.start for span in spans]
    compute = {"hessian": compute_hessian, "gauss_newton": compute_gauss_newton}[kind]

    def evaluate() -> None:
        losses = [lambda: loop.losses(batch).mean()]
        compute(losses, loop.model, basis, spans)

    evaluate()
    # The matrices themselves are not in the figure of the products.
    matrices = sum(width**2 for width in widths) * 4
    foretold = PassMemory(run).matrices(compute, samples, 20, widths) + matrices
    assert foretold == pytest.approx(measure_peak(evaluate), rel=0.2)
    plain = small_plan(folder, run="plain", stages=run.plan.model_dump()["stages"])
    with_products, without = (
        next(part for part in estimate_run(plan).memory if part.part == "training")
        for plan in (run.plan, plain)
    )
    assert with_products.passes > without.passes


@pytest.mark.parametrize("shard", ["none", "fsdp"])
def test_several_processes_each_take_a_part(folder: Path, shard: str) -> None:
    """Each has half of the samples. Those of FSDP2 hold half of the model, the first one copies."""
    model = {"factory": "tests.tasks.digits:network", "args": {"width": 10**5}}
    stages = [{"steps": 6, "batch_size": 41}]
    changes = {**COORDINATES, "model": model, "stages": stages}
    alone = estimate_run(small_plan(folder, run="alone", **changes))
    together = estimate_run(
        small_plan(folder, run="together", launch={"processes": 2, "shard": shard}, **changes)
    )
    assert alone.launch is None
    sentence = "each of 2 processes trains on 20 or 21 of the 41 samples of a step of stage 0"
    assert together.launch == sentence
    one, two = (
        {part.part: part for part in estimate.memory}.pop("training")
        for estimate in (alone, together)
    )
    assert (one.processes, two.processes) == (1, 2)
    weights = 4 * alone.parameters
    # Weights and two slots, gradients (twice for DDP), and the copy for a checkpoint. FSDP2 puts
    # the parameters together in a buffer of the largest one, 64 of the 75 per unit of width.
    assert one.peak == pytest.approx(7 * weights, rel=0.02)
    times = {"none": 8, "fsdp": 5 + 64 / 75}[shard]
    assert two.peak == pytest.approx(times * weights, rel=0.02)
    assert [part for part in alone.memory if part.part != "training"] == [
        part for part in together.memory if part.part != "training"
    ]


def test_embedding_counts_as_much_as_a_walk_takes(folder: Path) -> None:
    """The matrices of 600 coefficients and their slots are nearly all of it."""
    plan = small_plan(
        folder,
        run="walked",
        stages=[{"steps": 6, "batch_size": 20}],
        optimizer={"kind": "adamw", "lr": 0.01},
        basis={"kind": "coordinates", "numbers": 600},
        curvature={"kind": "empirical_fisher", "coupling": "full"},
    )
    run = curate_small(plan)
    segment = read_segment(run.folder.stage(0).segment(0))

    def walk() -> None:
        dtype = segment.contributions.dtype
        end = identity_transition(coupled_spans(run), count_slots(run), dtype)
        walk_segment(plan_dynamics(run, segment), end)

    foretold = next(part for part in estimate_run(plan).memory if part.part == "embedding")
    assert foretold.peak == pytest.approx(measure_peak(walk), rel=0.1)


def test_divided_gradients_of_layers_are_kept_in_part(folder: Path) -> None:
    plan = small_plan(folder, run="layered", model={"factory": f"{__name__}:Layered"})
    samples = list_target_samples(Run.of_plan(plan), "clean")
    passes = PassMemory(Run.of_plan(plan))
    layers = 3 * (500 * 500 + 500) * 4
    whole = passes.training(samples, 4, repeat=False)
    assert passes.training(samples, 4, repeat=False, parts=1) == whole
    quarters = passes.training(samples, 4, repeat=False, parts=4)
    # The last layer's gradient is whole for a moment.
    assert whole - quarters == pytest.approx(layers * 3 / 4 * 2 / 3, rel=0.1)
    assert passes.extrapolated is None


def test_a_pass_counts_the_search_for_where_to_capture(folder: Path) -> None:
    """Two and three samples pass in it, however few a step has."""
    peaks = {}
    for batch in (1, 5):
        stages = [{"steps": 6, "batch_size": batch}]
        estimate = estimate_run(
            small_plan(folder, run="few", stages=stages, model={"factory": f"{__name__}:Layered"})
        )
        peaks[batch] = {part.part: part.passes for part in estimate.memory}
    assert peaks[1]["fit of the basis"] == peaks[5]["fit of the basis"]
    assert peaks[1]["targets"] == peaks[5]["targets"]

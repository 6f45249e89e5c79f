"""Passes sized by memory: what they may take, and that results do not depend on their size."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch

from secateur.influence.memory_meter import measure_peak
from secateur.tasks.data.samples import list_target_samples
from secateur.tasks.results.valuation_results import read_replay_scores, read_target_gradients
from secateur.tasks.run import Run
from secateur.tasks.training import pass_size as module
from secateur.tasks.training.loop import eval_mode
from secateur.tasks.training.pass_size import largest_rows, pass_size, split_by_memory
from secateur.tasks.valuation.replay import replay_stage
from secateur.tasks.valuation.target_gradients import (
    differentiate_samples,
    loop_at_stage_end,
    split_for_gradients,
    target_loss,
    write_target_gradients,
)
from tests.tasks.small import curate_small, make_data, sample, small_plan

MEBIBYTE = 1 << 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("passes")
    make_data(path)
    return path


@pytest.mark.parametrize(
    ("fixed", "each", "count", "expected"),
    [
        (0, 100 * MEBIBYTE, 50, 10),
        (500 * MEBIBYTE, 100 * MEBIBYTE, 50, 5),
        (0, 100 * MEBIBYTE, 7, 7),
        (0, 2000 * MEBIBYTE, 50, 1),
        (0, 1, 1000, 256),
        (0, 100 * MEBIBYTE, 1, 1),
    ],
)
def test_a_pass_takes_what_the_plan_allows(
    folder: Path, fixed: int, each: int, count: int, expected: int
) -> None:
    plan = small_plan(folder, pass_memory=1024)
    assert pass_size(plan, lambda n: fixed + each * n, count) == expected


def test_the_samples_measured_are_the_largest(tmp_path: Path) -> None:
    longer = [sample(150, note=b"x" * 500), sample(151, note=b"x" * 900)]
    make_data(tmp_path, longer)
    plan = small_plan(tmp_path, targets={"clean": {"shards": f"{tmp_path}/train-1.tar"}})
    samples = list_target_samples(Run.of_plan(plan), "clean")
    rows = largest_rows(samples, torch.arange(len(samples)))
    assert samples.keys(rows[:2].tolist()) == ["digit-0151", "digit-0150"]


def test_results_do_not_depend_on_the_size_of_passes(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = {}
    for largest in (256, 5, 1):
        monkeypatch.setattr(module, "LARGEST_PASS", largest)
        plan = small_plan(
            folder,
            run=f"passes-{largest}",
            stages=[{"steps": 12, "batch_size": 20}],
            dtype="float64",
        )
        run = curate_small(plan)
        replay_stage(run, 0)
        metrics = write_target_gradients(run, 0)["clean"]
        samples = list_target_samples(run, "clean")
        loop = loop_at_stage_end(run, 0)
        loss = target_loss(loop, samples, torch.arange(len(samples)))
        tensors = [read_target_gradients(run, 0, "clean")]
        tensors += [read_replay_scores(run, 0, n)["clean"] for n in range(2)]
        tensors.append(torch.tensor([metrics["loss"], metrics["accuracy"], loss]))
        found[largest] = torch.cat([tensor.flatten().double() for tensor in tensors])
    torch.testing.assert_close(found[5], found[256], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found[1], found[256], rtol=1e-9, atol=1e-12)


def test_passes_are_as_large_as_the_memory_allows(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = small_plan(folder, run="allowed", pass_memory=1, stages=[{"steps": 6, "batch_size": 20}])
    run = curate_small(plan)
    samples = list_target_samples(run, "clean")
    loop = loop_at_stage_end(run, 0)

    def losses(part: torch.Tensor) -> torch.Tensor:
        return loop.task.losses(loop.model, loop.batch(part, samples))

    rows = torch.arange(len(samples))
    with eval_mode(loop.model), torch.no_grad():
        peaks = [measure_peak(partial(losses, rows[:count])) for count in (7, 8)]
        monkeypatch.setattr(module, "MEBIBYTE", peaks[0])
        parts = split_by_memory(plan, samples, rows, losses)
    assert peaks[0] < peaks[1]
    assert [len(part) for part in parts] == [7, 7, 7, 3]


def test_finding_where_to_capture_does_not_make_passes_larger(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes the passes of five samples, however few the pass that is measured has."""
    plan = small_plan(folder, run="located", pass_memory=1, stages=[{"steps": 6, "batch_size": 20}])
    run = curate_small(plan)
    samples = list_target_samples(run, "clean")
    loop = loop_at_stage_end(run, 0)
    rows = torch.arange(len(samples))

    def run_pass(count: int) -> None:
        differentiate_samples(loop, samples, rows[:count], check=False)

    run_pass(3)
    peaks = [measure_peak(partial(run_pass, count)) for count in (7, 8)]
    monkeypatch.setattr(module, "MEBIBYTE", peaks[0])
    parts = split_for_gradients(loop_at_stage_end(run, 0), samples, rows)
    assert peaks[0] < peaks[1]
    assert [len(part) for part in parts] == [7, 7, 7, 3]

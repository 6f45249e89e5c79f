"""How tasks behave under a real Prefect server: cached, tried again, limited, timed out."""

from __future__ import annotations

import importlib
import os
import pkgutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prefect import Task, flow
from prefect.client.orchestration import get_client
from prefect.context import refresh_global_settings_context

import secateur.tasks
from secateur.errors import PlanError, SecateurError, StorageError, UnavailableError
from secateur.flows.workers import Call, worker_pool
from secateur.tasks.engine.prefect_server import prefect_server
from secateur.tasks.engine.prefect_task import TAG, pipeline_task
from secateur.tasks.plan import WorkersConfig
from secateur.tasks.pruning.prune import write_pruned_stage
from secateur.tasks.run.run import Run
from secateur.tasks.valuation.index import index_stage
from secateur.tasks.valuation.score import read_scores
from tests.tasks.small import curate_small, make_data, small_plan

POLICY = {"policy": "random", "keep": 0.5}
SPANS: list[tuple[float, float]] = []


@pytest.fixture(scope="module", autouse=True)
def prefect() -> Iterator[None]:
    before = dict(os.environ)
    with prefect_server():
        yield
    os.environ.clear()
    os.environ.update(before)
    refresh_global_settings_context()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("behaviour")
    make_data(folder)
    return curate_small(small_plan(folder, stages=[{"steps": 4, "batch_size": 20}]))


@pipeline_task("sleep")
def sleeping(run_url: str, seconds: float, number: int = 0) -> None:
    _sleep(seconds)


@pipeline_task("sleep by turns")
def sleeping_by_turns(run_url: str, seconds: float, number: int) -> None:
    _sleep(seconds)


def _sleep(seconds: float) -> None:
    begun = time.monotonic()
    time.sleep(seconds)
    SPANS.append((begun, time.monotonic()))


def result_of(of: Task[..., Any], *arguments: Any) -> tuple[str, Any]:
    """The state's name and the result of a task in a flow run of its own."""
    found = []

    @flow
    def asking() -> None:
        state = of(*arguments, return_state=True)
        found.append((state.name, state.result(raise_on_failure=False)))

    asking()
    return found[0]


def test_a_rerun_takes_the_result_while_the_artefact_stands(run: Run) -> None:
    artefact = run.folder.stage(0).prune("random-0.5")
    name, made = result_of(write_pruned_stage, run.url, 0, POLICY)
    assert (name, made.kept) == ("Completed", 100)
    assert result_of(write_pruned_stage, run.url, 0, POLICY) == ("Cached", made)
    name, other = result_of(write_pruned_stage, run.url, 0, {"policy": "random", "keep": 0.25})
    assert (name, other.kept) == ("Completed", 80)

    artefact.remove()
    name, again = result_of(write_pruned_stage, run.url, 0, POLICY)
    assert name == "Completed"
    assert again.shards != made.shards
    assert all(Path(shard).exists() for shard in again.shards)
    assert result_of(write_pruned_stage, run.url, 0, POLICY) == ("Cached", again)


def test_a_result_is_not_taken_for_an_artefact_that_changed(run: Run) -> None:
    artefact = run.folder.stage(0).index
    assert result_of(index_stage, run.url, 0)[1] == 80
    assert result_of(index_stage, run.url, 0) == ("Cached", 80)
    artefact.remove()
    with artefact.attempt("index", {}) as attempt:
        attempt.write("index.faiss", b"of another")
        attempt.facts.update(vectors=7)
    assert result_of(index_stage, run.url, 0) == ("Completed", 7)
    assert result_of(index_stage, run.url, 0) == ("Cached", 7)
    artefact.remove()
    assert result_of(index_stage, run.url, 0) == ("Completed", len(read_scores(run, 0)))


@pytest.mark.parametrize(
    ("error", "tries"),
    [
        (UnavailableError("the store does not answer"), 3),
        (StorageError("the shard is damaged"), 1),
        (PlanError("the loss is nan"), 1),
        (SecateurError("the optimizer is unknown"), 1),
        (ZeroDivisionError(), 1),
    ],
)
def test_only_what_can_pass_is_tried_again(
    error: Exception, tries: int, capsys: pytest.CaptureFixture[str]
) -> None:
    taken = []

    @pipeline_task("try")
    def trying(run_url: str) -> int:
        taken.append(run_url)
        if len(taken) < 3:
            raise error
        return len(taken)

    name, found = result_of(trying.with_options(retry_delay_seconds=[0]), "runs/any")
    assert len(taken) == tries
    assert (name, found) == (("Completed", 3) if tries == 3 else ("Failed", error))
    assert capsys.readouterr().err.count("the store does not answer; trying again") == tries - 1


def test_what_takes_too_long_is_a_sentence() -> None:
    @flow
    def limited() -> None:
        with worker_pool(WorkersConfig(timeout=0.5)) as workers:
            workers.call(sleeping, "runs/any", 30)

    begun = time.monotonic()
    with pytest.raises(
        PlanError, match=r"sleep took longer than the 0.5 s of `workers.timeout`; raise it"
    ):
        limited()
    assert time.monotonic() - begun < 20


@pytest.mark.parametrize(("of", "limited"), [(sleeping, False), (sleeping_by_turns, True)])
def test_a_limit_on_a_tag_is_kept(of: Task[..., None], limited: bool) -> None:
    @flow
    def side_by_side() -> None:
        with worker_pool(WorkersConfig(kind="threads", count=2)) as workers:
            workers.map([Call(of, ("runs/any", 0.6, number)) for number in range(2)], "sleeping")

    SPANS.clear()
    with get_client(sync_client=True) as client:
        client.create_concurrency_limit("secateur-sleep-by-turns", 1)
    side_by_side()
    (_, first_end), (second_begin, _) = sorted(SPANS)
    assert (second_begin > first_end) is limited


def test_every_task_is_one_of_ours() -> None:
    found = {}
    for module in pkgutil.walk_packages(secateur.tasks.__path__, "secateur.tasks."):
        for name, value in vars(importlib.import_module(module.name)).items():
            if isinstance(value, Task):
                found[name] = value
    assert len(found) > 10
    for of in found.values():
        assert {TAG, f"{TAG}-{of.name.replace(' ', '-')}"} <= of.tags
        assert of.retries
        assert of.retry_condition_fn

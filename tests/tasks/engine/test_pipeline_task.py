"""Pipeline tasks on a real Prefect server: caching, retries, concurrency limits and timeouts."""

from __future__ import annotations

import importlib
import inspect
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
from secateur.flows import pipeline_tasks
from secateur.flows.workers import Call, worker_pool
from secateur.tasks.engine.pipeline_task import TAG, PipelineTask
from secateur.tasks.engine.prefect_server import prefect_server
from secateur.tasks.plan import WorkersConfig
from secateur.tasks.pruning.policies import RandomPolicy
from secateur.tasks.results.valuation_results import read_scores
from secateur.tasks.run import Run
from tests.tasks.small import curate_small, make_data, small_plan

HALF = RandomPolicy(keep=0.5)
QUARTER = RandomPolicy(keep=0.25)
# When each sleep began and ended.
SLEEPS: list[tuple[float, float]] = []


@pytest.fixture(scope="module", autouse=True)
def prefect() -> Iterator[None]:
    """A Prefect server for this module, and the environment as it was afterwards."""
    environment = dict(os.environ)
    with prefect_server():
        yield
    os.environ.clear()
    os.environ.update(environment)
    refresh_global_settings_context()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run of one stage, which is trained and scored."""
    folder = tmp_path_factory.mktemp("pipeline")
    make_data(folder)
    return curate_small(small_plan(folder, stages=[{"steps": 4, "batch_size": 20}]))


def _sleep(run: Run, seconds: float, number: int = 0) -> None:
    start = time.monotonic()
    time.sleep(seconds)
    SLEEPS.append((start, time.monotonic()))


SLEEP = PipelineTask("sleep", _sleep)
SLEEP_IN_TURN = PipelineTask("sleep by turns", _sleep)


def call_in_flow(task: Task[..., Any], *args: Any, **kwargs: Any) -> tuple[str, Any]:
    """Call a task in a new flow run, and return the name of its state and its result."""
    results = []

    @flow
    def call() -> None:
        state = task(*args, **kwargs, return_state=True)
        results.append((state.name, state.result(raise_on_failure=False)))

    call()
    return results[0]


def test_a_rerun_takes_the_result_while_the_output_is_unchanged(run: Run) -> None:
    prune = pipeline_tasks.write_shards.prefect_task
    output = run.folder.stage(0).prune("random-0.5")
    state, first = call_in_flow(prune, run.url, 0, HALF)
    assert (state, first.kept) == ("Completed", 100)
    assert call_in_flow(prune, run.url, 0, HALF) == ("Cached", first)
    assert call_in_flow(prune, run_url=run.url, stage=0, policy=HALF) == ("Cached", first)
    state, other = call_in_flow(prune, run.url, 0, QUARTER)
    assert (state, other.kept) == ("Completed", 80)

    output.remove()
    state, again = call_in_flow(prune, run.url, 0, HALF)
    assert state == "Completed"
    assert again.shards != first.shards
    assert all(Path(shard).exists() for shard in again.shards)
    assert call_in_flow(prune, run.url, 0, HALF) == ("Cached", again)


def test_a_result_is_not_taken_for_an_output_that_changed(run: Run) -> None:
    index = pipeline_tasks.index_embeddings.prefect_task
    output = run.folder.stage(0).index
    assert call_in_flow(index, run.url, 0)[1] == 80
    assert call_in_flow(index, run.url, 0) == ("Cached", 80)
    output.remove()
    with output.attempt("index", {}) as attempt:
        attempt.write("index.faiss", b"of another")
        attempt.facts.update(vectors=7)
    assert call_in_flow(index, run.url, 0) == ("Completed", 7)
    assert call_in_flow(index, run.url, 0) == ("Cached", 7)
    output.remove()
    assert call_in_flow(index, run.url, 0) == ("Completed", len(read_scores(run, 0)))


def test_without_prefect_the_function_itself_is_called(run: Run) -> None:
    def describe(opened: Run, number: int) -> tuple[str, int]:
        return opened.url, number

    task = PipelineTask("describe", describe)
    assert task.run_without_prefect(run.url, 3) == (run.url, 3)
    with pytest.raises(PlanError, match="nowhere holds no run"):
        task.run_without_prefect("nowhere", 3)


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
def test_only_an_unavailable_store_is_tried_again(
    run: Run, error: Exception, tries: int, capsys: pytest.CaptureFixture[str]
) -> None:
    urls = []

    def fail_twice(opened: Run) -> int:
        urls.append(opened.url)
        if len(urls) < 3:
            raise error
        return len(urls)

    task = PipelineTask("try", fail_twice).prefect_task.with_options(retry_delay_seconds=[0])
    state, result = call_in_flow(task, run.url)
    assert urls == [run.url] * tries
    assert (state, result) == (("Completed", 3) if tries == 3 else ("Failed", error))
    assert capsys.readouterr().err.count("the store does not answer; trying again") == tries - 1


def test_a_task_that_takes_too_long_is_one_sentence(run: Run) -> None:
    @flow
    def call_with_timeout() -> None:
        with worker_pool(WorkersConfig(timeout=0.5)) as workers:
            workers.call(SLEEP, run.url, 30)

    start = time.monotonic()
    with pytest.raises(
        PlanError, match=r"sleep took longer than the 0.5 s of `workers.timeout`; raise it"
    ):
        call_with_timeout()
    assert time.monotonic() - start < 20


@pytest.mark.parametrize(("task", "is_limited"), [(SLEEP, False), (SLEEP_IN_TURN, True)])
def test_a_concurrency_limit_on_a_tag_is_kept(
    run: Run, task: PipelineTask[..., None], is_limited: bool
) -> None:
    @flow
    def sleep_in_two_threads() -> None:
        with worker_pool(WorkersConfig(kind="threads", count=2)) as workers:
            workers.map([Call(task, (run.url, 0.6, number)) for number in range(2)], "sleeping")

    SLEEPS.clear()
    with get_client(sync_client=True) as client:
        client.create_concurrency_limit("secateur-sleep-by-turns", 1)
    sleep_in_two_threads()
    (_, first_end), (second_start, _) = sorted(SLEEPS)
    assert (second_start > first_end) is is_limited


def listed_tasks() -> list[PipelineTask[..., Any]]:
    """Every pipeline task of the flows."""
    return [one for one in vars(pipeline_tasks).values() if isinstance(one, PipelineTask)]


def test_every_task_of_the_flows_is_tagged_and_retried() -> None:
    tasks = listed_tasks()
    assert len(tasks) > 20
    assert len({task.name for task in tasks}) == len(tasks)
    for task in tasks:
        prefect_task = task.prefect_task
        assert prefect_task.name == task.name
        assert {TAG, f"{TAG}-{task.name.replace(' ', '-')}"} <= prefect_task.tags
        assert prefect_task.retries
        assert prefect_task.retry_condition_fn


def test_every_task_names_its_outputs_from_its_own_arguments() -> None:
    for task in listed_tasks():
        if task.outputs is not None:
            parameters = inspect.signature(task.function).parameters
            inspect.signature(task.outputs).bind(*parameters)


def test_no_module_makes_prefect_tasks_by_itself() -> None:
    names = [one.name for one in pkgutil.walk_packages(secateur.tasks.__path__, "secateur.tasks.")]
    modules = [importlib.import_module(name) for name in [*names, pipeline_tasks.__name__]]
    assert len(modules) > 60
    assert [
        f"{module.__name__}.{name}"
        for module in modules
        for name, value in vars(module).items()
        if isinstance(value, Task)
    ] == []

"""Run a flow's tasks: in this process, or in parallel on the plan's workers."""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, ParamSpec, Protocol, TypeVar

from prefect import Task
from prefect.task_engine import TaskRunTimeoutError
from prefect.task_runners import ProcessPoolTaskRunner, TaskRunner, ThreadPoolTaskRunner

from secateur.errors import PlanError
from secateur.tasks.engine.pipeline_task import PipelineTask
from secateur.tasks.engine.prefect_internals import (
    interrupt_threads,
    start_runner,
    stop_runner,
    submit_task,
    wait_for_future,
)
from secateur.tasks.engine.progress import track
from secateur.tasks.engine.ui_artifacts import ProgressArtifact
from secateur.tasks.plan import WorkersConfig

P = ParamSpec("P")
R = TypeVar("R")


class Call(NamedTuple):
    """A pipeline task and its arguments: the run's URL and small values."""

    task: PipelineTask[..., Any]
    arguments: tuple[Any, ...]


class Workers(Protocol):
    """The interface by which a flow runs pipeline tasks."""

    @property
    def count(self) -> int | None:
        """How many tasks run at the same time; None if a cluster decides that."""
        ...

    @property
    def kind(self) -> str:
        """`threads`, `processes`, `dask`, `ray`, or `inline`."""
        ...

    def call(self, task: PipelineTask[P, R], run_url: str, *args: P.args, **kwargs: P.kwargs) -> R:
        """Run a task and return its result."""
        ...

    def map(
        self, calls: Sequence[Call], label: str, progress: ProgressArtifact | None = None
    ) -> None:
        """Run tasks that do not depend on one another. Their results are outputs of the run."""
        ...


class InlineWorkers:
    """Runs every task as a plain function in this thread, without Prefect."""

    count = 1
    kind = "inline"

    def call(self, task: PipelineTask[P, R], run_url: str, *args: P.args, **kwargs: P.kwargs) -> R:
        """Run a task and return its result."""
        return task.run_without_prefect(run_url, *args, **kwargs)

    def map(
        self, calls: Sequence[Call], label: str, progress: ProgressArtifact | None = None
    ) -> None:
        """Run tasks one after the other."""
        for call in calls:
            call.task.run_without_prefect(*call.arguments)


class WorkerPool:
    """A plan's workers, as Prefect tasks. They start when first needed, and serve one flow run."""

    def __init__(self, config: WorkersConfig) -> None:
        self.config = config
        self._runner: TaskRunner[Any] | None = None

    @property
    def count(self) -> int | None:
        """How many tasks run at the same time; None if a cluster decides that."""
        return None if self.config.address else self.config.count or os.cpu_count() or 1

    @property
    def kind(self) -> str:
        """`threads`, `processes`, `dask` or `ray`."""
        return self.config.kind

    def call(self, task: PipelineTask[P, R], run_url: str, *args: P.args, **kwargs: P.kwargs) -> R:
        """Run a task in this process and return its result.

        Raises:
            PlanError: it took longer than the plan allows.
        """
        with self._explain_timeout(task):
            return self._with_timeout(task)(run_url, *args, **kwargs)

    def map(
        self, calls: Sequence[Call], label: str, progress: ProgressArtifact | None = None
    ) -> None:
        """Run tasks that do not depend on one another, in parallel if there are workers.

        Args:
            label: names the progress bar.
            progress: shows in Prefect's UI how many are finished.

        Raises:
            PlanError: the workers need a package that is not installed, or cannot be reached.
        """
        parallel = [call for call in calls if self._runs_in_parallel(call, len(calls))]
        futures = [self._submit(call) for call in parallel]
        local = [call for call in calls if call not in parallel]
        for done, call in enumerate(local, 1):
            self.call(call.task, *call.arguments)
            if progress:
                progress.update(done)
        pairs = zip(parallel, futures, strict=True)
        for done, (call, future) in enumerate(track(pairs, label, len(parallel)), len(local) + 1):
            with self._explain_timeout(call.task):
                wait_for_future(future)
            if progress:
                progress.update(done)

    def shutdown(self, interrupted: bool = False) -> None:
        """End the workers. After an interruption, running tasks are not waited for."""
        if self._runner is None:
            return
        if interrupted and self.kind == "threads":
            interrupt_threads()
        if interrupted and self.kind == "processes":
            for child in multiprocessing.active_children():
                child.terminate()
        stop_runner(self._runner)
        self._runner = None

    def _runs_in_parallel(self, call: Call, calls: int) -> bool:
        if calls == 1 or self.count == 1:
            return False
        # All threads share one stream of random numbers, so tasks that draw from it take turns.
        return not (self.kind == "threads" and call.task.uses_random_numbers)

    def _submit(self, call: Call) -> Any:
        if self._runner is None:
            self._runner = self._start()
        return submit_task(self._runner, self._with_timeout(call.task), call.arguments)

    def _start(self) -> TaskRunner[Any]:
        runner = _make_runner(self.config, self.count)
        try:
            start_runner(runner)
        except Exception as error:
            if self.config.address is None:
                raise
            raise PlanError(
                f"the {self.kind} workers at {self.config.address} cannot be reached ({error}); "
                f"start them, or change `workers`"
            ) from error
        return runner

    def _with_timeout(self, task: PipelineTask[P, R]) -> Task[..., R]:
        timeout = self.config.timeout
        prefect_task = task.prefect_task
        return prefect_task.with_options(timeout_seconds=timeout) if timeout else prefect_task

    @contextmanager
    def _explain_timeout(self, task: PipelineTask[..., Any]) -> Iterator[None]:
        try:
            yield
        except TaskRunTimeoutError:
            raise PlanError(
                f"{task.name} took longer than the {self.config.timeout:g} s of "
                f"`workers.timeout`; raise it, or run the same command again, which continues"
            ) from None


@contextmanager
def worker_pool(config: WorkersConfig) -> Iterator[WorkerPool]:
    """The workers of a flow run, which end with the block."""
    pool = WorkerPool(config)
    try:
        yield pool
    except BaseException as error:
        pool.shutdown(interrupted=not isinstance(error, Exception))
        raise
    pool.shutdown()


def _make_runner(config: WorkersConfig, count: int | None) -> TaskRunner[Any]:
    """Prefect's task runner for a plan's workers."""
    if config.kind == "threads":
        return ThreadPoolTaskRunner(max_workers=count)
    if config.kind == "processes":
        return ProcessPoolTaskRunner(max_workers=count)
    if importlib.util.find_spec(f"prefect_{config.kind}") is None:
        raise PlanError(
            f"`workers: {{kind: {config.kind}}}` needs prefect-{config.kind}; "
            f"`pip install secateur[{config.kind}]`"
        )
    return _dask_runner(config, count) if config.kind == "dask" else _ray_runner(config, count)


def _dask_runner(config: WorkersConfig, count: int | None) -> TaskRunner[Any]:
    from prefect_dask.task_runners import DaskTaskRunner

    if config.address:
        return DaskTaskRunner(address=config.address)
    own_cluster = {"n_workers": count, "threads_per_worker": 1, "dashboard_address": None}
    return DaskTaskRunner(cluster_kwargs=own_cluster)


def _ray_runner(config: WorkersConfig, count: int | None) -> TaskRunner[Any]:
    # Otherwise Ray asks for a token, even of itself on one machine.
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    from prefect_ray import RayTaskRunner

    runner: TaskRunner[Any]
    if config.address:
        runner = RayTaskRunner(address=config.address)
    else:
        own_cluster = {"num_cpus": count, "include_dashboard": False, "log_to_driver": False}
        runner = RayTaskRunner(init_kwargs=own_cluster)
    return runner

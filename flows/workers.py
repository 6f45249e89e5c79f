"""Room `flows`: who carries out a flow's tasks: this process, and where parts can run side by side, the plan's workers."""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, ParamSpec, TypeVar

from prefect import Task
from prefect.task_engine import TaskRunTimeoutError
from prefect.task_runners import ProcessPoolTaskRunner, TaskRunner, ThreadPoolTaskRunner
from prefect.utilities.callables import get_call_parameters

from secateur.errors import PlanError
from secateur.tasks.engine.prefect_task import interrupt_threads, uses_random_numbers
from secateur.tasks.engine.progress import track
from secateur.tasks.engine.ui_artifacts import ProgressArtifact
from secateur.tasks.plan import WorkersConfig

SECONDS_A_TURN = 1.0

P = ParamSpec("P")
R = TypeVar("R")


class Call(NamedTuple):
    """A task and its arguments: URLs and small values."""

    task: Task[..., Any]
    arguments: tuple[Any, ...]


class WorkerPool:
    """A plan's workers; they are started when there is something for them to do, and serve one flow run."""

    def __init__(self, spec: WorkersConfig) -> None:
        self.spec = spec
        self._runner: TaskRunner[Any] | None = None

    @property
    def count(self) -> int | None:
        """How many work at once, where this process knows."""
        return None if self.spec.address else self.spec.count or os.cpu_count() or 1

    def call(self, task: Task[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Runs a task here and now.

        Raises:
            PlanError: it took longer than the plan allows.
        """
        with self._timed(task):
            return self._limited(task)(*args, **kwargs)

    def map(self, calls: Sequence[Call], label: str, live: ProgressArtifact | None = None) -> None:
        """Runs tasks that do not need one another, side by side where there are workers; their results are artefacts.

        Args:
            live: shows how many are done.

        Raises:
            PlanError: the workers need something that is not installed, or cannot be reached.
        """
        beside = calls if len(calls) > 1 and self.count != 1 else []
        if self.spec.kind == "threads":
            beside = [call for call in beside if not uses_random_numbers(call.task)]
        futures = [self._submit(call) for call in beside]
        here = [call for call in calls if call not in beside]
        for done, call in enumerate(here, 1):
            self.call(call.task, *call.arguments)
            _show(live, done)
        waited = zip(beside, futures, strict=True)
        for done, (call, future) in enumerate(track(waited, label, len(beside)), len(here) + 1):
            with self._timed(call.task):
                _await(future)
            _show(live, done)

    def _submit(self, call: Call) -> Any:
        if self._runner is None:
            self._runner = self._started()
        task = self._limited(call.task)
        return self._runner.submit(task, get_call_parameters(task.fn, call.arguments, {}))

    def _started(self) -> TaskRunner[Any]:
        runner = _runner(self.spec, self.count)
        try:
            runner.__enter__()
            getattr(runner, "client", None)  # Dask's connects when it is asked for
        except Exception as error:
            if self.spec.address is None:
                raise
            raise PlanError(
                f"the {self.spec.kind} workers at {self.spec.address} cannot be reached ({error}); start them, or change `workers`"
            ) from error
        return runner

    def _limited(self, task: Task[P, R]) -> Task[P, R]:
        return task.with_options(timeout_seconds=self.spec.timeout) if self.spec.timeout else task

    @contextmanager
    def _timed(self, task: Task[..., Any]) -> Iterator[None]:
        try:
            yield
        except TaskRunTimeoutError:
            raise PlanError(
                f"{task.name} took longer than the {self.spec.timeout:g} s of `workers.timeout`; raise it, or run the same "
                f"command again, which carries on"
            ) from None

    def shutdown(self, interrupted: bool = False) -> None:
        """Ends the workers; an interruption does not wait for what is under way."""
        if self._runner is None:
            return
        if interrupted and self.spec.kind == "threads":
            interrupt_threads()
        if interrupted and self.spec.kind == "processes":
            for child in multiprocessing.active_children():
                child.terminate()
        self._runner.__exit__(None, None, None)
        self._runner = None


def _await(future: Any) -> None:
    """Waits by turns, for a main thread that waits without an end does not hear an interruption."""
    while True:
        try:
            future.result(timeout=SECONDS_A_TURN)
            return
        except TimeoutError:
            if future.state.is_final():  # it has ended since, or the timeout is the task's own
                future.result()
                return


def _show(live: ProgressArtifact | None, done: int) -> None:
    if live is not None:
        live.reach(done)


@contextmanager
def worker_pool(spec: WorkersConfig) -> Iterator[WorkerPool]:
    """The workers of a flow run."""
    found = WorkerPool(spec)
    try:
        yield found
    except BaseException as error:
        found.shutdown(interrupted=not isinstance(error, Exception))
        raise
    found.shutdown()


def _runner(spec: WorkersConfig, count: int | None) -> TaskRunner[Any]:
    """Prefect's task runner for a plan's workers."""
    if spec.kind == "threads":
        return ThreadPoolTaskRunner(max_workers=count)
    if spec.kind == "processes":
        return ProcessPoolTaskRunner(max_workers=count)
    if importlib.util.find_spec(f"prefect_{spec.kind}") is None:
        raise PlanError(
            f"`workers: {{kind: {spec.kind}}}` needs prefect-{spec.kind}; `pip install secateur[{spec.kind}]`"
        )
    return _dask(spec, count) if spec.kind == "dask" else _ray(spec, count)


def _dask(spec: WorkersConfig, count: int | None) -> TaskRunner[Any]:
    from prefect_dask import DaskTaskRunner

    if spec.address:
        return DaskTaskRunner(address=spec.address)
    own = {"n_workers": count, "threads_per_worker": 1, "dashboard_address": None}
    return DaskTaskRunner(cluster_kwargs=own)


def _ray(spec: WorkersConfig, count: int | None) -> TaskRunner[Any]:
    os.environ.setdefault(
        "RAY_AUTH_MODE", "disabled"
    )  # Ray wants a token otherwise, even of itself on one machine
    from prefect_ray import RayTaskRunner

    if spec.address:
        return RayTaskRunner(address=spec.address)
    return RayTaskRunner(
        init_kwargs={"num_cpus": count, "include_dashboard": False, "log_to_driver": False}
    )

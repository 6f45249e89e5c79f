"""Room `tasks`: how every task behaves under Prefect: what it is cached by, when it is tried again, what it is tagged with."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import inspect
import json
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, ParamSpec, TypeVar

from prefect import Task
from prefect.cache_policies import NO_CACHE, CacheKeyFnPolicy
from prefect.client.schemas.objects import State, TaskRun
from prefect.context import TaskRunContext
from prefect.transactions import get_transaction

from secateur.errors import UnavailableError
from secateur.storage.outputs import Output
from secateur.tasks.engine.progress import print_status
from secateur.tasks.run.run import Run

P = ParamSpec("P")
R = TypeVar("R")

PAUSES = [
    2.0,
    8.0,
    32.0,
]  # seconds before each further attempt; the store's client has tried for itself before
JITTER = 0.3
TAG = "secateur"

_turn = threading.RLock()
_threads: set[int] = set()  # that carry out tasks, besides the main one


class TaskInterrupted(BaseException):
    """A task's thread is to end: its flow run has been interrupted."""


def pipeline_task(
    name: str, makes: Callable[..., Output | Iterable[Output]] | None = None, draws: bool = False
) -> Callable[[Callable[P, R]], Task[P, R]]:
    """A Prefect task of ours, whose first argument is the run's URL.

    It is tried again where the store did not answer, and never for what would be wrong again. Its tags `secateur` and
    `secateur-<name>` can carry concurrency limits.

    Args:
        makes: gives, from the opened run and the other arguments, the artefacts that the task makes. Its result is then
            cached by their fingerprints: while they stand as they are, a rerun takes the result and shows `Cached`.
        draws: whether it draws from torch's random numbers, of which a process has one stream; such tasks take turns.
    """

    def decorate(fn: Callable[P, R]) -> Task[P, R]:
        @functools.wraps(fn)
        def body(*args: P.args, **kwargs: P.kwargs) -> R:
            return _perform(fn, makes, draws, args, kwargs)

        body.draws = draws  # type: ignore[attr-defined]  # see `is_drawing`
        return Task(
            fn=body,
            name=name,
            task_run_name=functools.partial(_run_name, name),
            tags=[TAG, f"{TAG}-{name.replace(' ', '-')}"],
            retries=len(PAUSES),
            retry_delay_seconds=PAUSES,
            retry_jitter_factor=JITTER,
            retry_condition_fn=_may_pass,
            cache_policy=CacheKeyFnPolicy(cache_key_fn=lambda _, inputs: _key(fn, makes, inputs))
            if makes
            else NO_CACHE,
            persist_result=makes is not None,
            result_serializer="json",
        )

    return decorate


def _run_name(name: str, parameters: dict[str, Any]) -> str:
    """What a task run is called: `train, stage 0`, `rewrite shard, stage 0, number 3`."""
    told = [
        f"{key} {value}"
        for key, value in parameters.items()
        if key != "run_url" and isinstance(value, int)
    ]
    return ", ".join([name, *told])


def uses_random_numbers(of: Task[..., Any]) -> bool:
    """Whether a task draws from torch's random numbers, and must not run beside another that does in one process."""
    return bool(getattr(of.fn, "draws", False))


def interrupt_threads() -> None:
    """Interrupts every task that another thread of this process carries out, as a signal interrupts the main one: at its next
    instruction, so that what it was writing is taken back."""
    for thread in list(_threads):
        ctypes.pythonapi.PyThreadState_SetAsyncExc(
            ctypes.c_ulong(thread), ctypes.py_object(TaskInterrupted)
        )


@contextmanager
def _stoppable() -> Iterator[None]:
    thread = threading.get_ident()
    if thread == threading.main_thread().ident or thread in _threads:
        yield
        return
    _threads.add(thread)
    try:
        yield
    finally:
        _threads.discard(thread)


def _perform(
    fn: Callable[..., R], makes: Callable[..., Any] | None, draws: bool, args: Any, kwargs: Any
) -> R:
    """Does the work, then files the result under the artefacts that it has come to."""
    with _turn if draws else nullcontext(), _stoppable():
        result = fn(*args, **kwargs)
    context, transaction = TaskRunContext.get(), get_transaction()
    own = context is not None and inspect.unwrap(context.task.fn) is fn  # not within another task
    if makes and own and transaction is not None:
        transaction.key = _key(fn, makes, inspect.signature(fn).bind(*args, **kwargs).arguments)
    return result


def _key(
    fn: Callable[..., Any], makes: Callable[..., Any] | None, inputs: dict[str, Any]
) -> str | None:
    """What a result is cached by: the task, its arguments, and the artefacts as they stand. Where one is missing no result
    was ever filed under the key, so the task runs."""
    others = inspect.signature(fn).bind(**inputs)
    others.apply_defaults()
    values = dict(others.arguments)
    assert makes is not None
    try:
        made = makes(Run.open(values["run_url"]), *list(values.values())[1:])
        artefacts = [made] if isinstance(made, Output) else list(made)
        stand = [
            [a.root.url, *([a.fingerprint, a.manifest.attempt] if a.committed else [])]
            for a in artefacts
        ]
    except ValueError:  # the task will say what is wrong
        return None
    content = json.dumps(
        [f"{fn.__module__}.{fn.__qualname__}", values, stand], sort_keys=True, default=str
    )
    return f"secateur-{hashlib.sha256(content.encode()).hexdigest()}"


def _may_pass(of: Task[..., Any], run: TaskRun, state: State[Any]) -> bool:
    """Whether the cause of a failure can pass by itself."""
    if not isinstance(state.data, UnavailableError):
        return False
    print_status(f"{of.name}: {state.data}; trying again")
    return True

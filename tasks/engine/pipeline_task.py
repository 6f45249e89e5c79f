"""Pipeline tasks: plain functions that Prefect can cache, retry, limit and run elsewhere."""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
import threading
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Concatenate, Generic, ParamSpec, TypeVar

from pydantic import TypeAdapter

from secateur.errors import UnavailableError
from secateur.storage.outputs import Output
from secateur.tasks.engine.progress import print_status
from secateur.tasks.run import Run

if TYPE_CHECKING:
    from prefect import Task
    from prefect.client.schemas.objects import State, TaskRun

P = ParamSpec("P")
R = TypeVar("R")

# Seconds before each retry. The store's client has already retried by itself.
RETRY_DELAYS = [2.0, 8.0, 32.0]
RETRY_JITTER = 0.3
TAG = "secateur"

# A process has one stream of torch's random numbers, so tasks that use it take turns.
_random_numbers_lock = threading.RLock()


@dataclass(frozen=True)
class PipelineTask(Generic[P, R]):
    """A plain function of an opened run, and how Prefect runs it.

    Prefect passes the run's URL and small values between processes, and the run is opened there.

    Attributes:
        name: shown in Prefect's UI. The task is tagged `secateur` and `secateur-<name>`, so that
            either tag can have a concurrency limit.
        function: takes the run and small values that pydantic can serialize.
        outputs: returns the outputs that the function writes, from the run and the other arguments.
            A rerun then takes the result from Prefect's cache while these outputs are unchanged.
        uses_random_numbers: whether it draws from torch's random numbers.
    """

    name: str
    function: Callable[Concatenate[Run, P], R]
    outputs: Callable[..., Output | Iterable[Output]] | None = None
    uses_random_numbers: bool = False

    def __call__(self, run_url: str, *args: P.args, **kwargs: P.kwargs) -> R:
        """Run it as a Prefect task in this process, and wait for its result."""
        return self.prefect_task(run_url, *args, **kwargs)

    def run_without_prefect(self, run_url: str, *args: P.args, **kwargs: P.kwargs) -> R:
        """Run the function itself, in this thread."""
        return self.function(Run.open(run_url), *args, **kwargs)

    @functools.cached_property
    def prefect_task(self) -> Task[..., R]:
        """The Prefect task. It is retried only if the disk or store did not answer."""
        from prefect import Task
        from prefect.cache_policies import NO_CACHE, CacheKeyFnPolicy

        body = _task_body(self.function, self.outputs, self.uses_random_numbers)
        cached = functools.partial(_cache_key, self.function, self.outputs)
        return Task(
            fn=body,
            name=self.name,
            task_run_name=functools.partial(_task_run_name, self.name),
            tags=[TAG, f"{TAG}-{self.name.replace(' ', '-')}"],
            retries=len(RETRY_DELAYS),
            retry_delay_seconds=RETRY_DELAYS,
            retry_jitter_factor=RETRY_JITTER,
            retry_condition_fn=_should_retry,
            cache_policy=CacheKeyFnPolicy(cache_key_fn=lambda _, inputs: cached(inputs))
            if self.outputs
            else NO_CACHE,
            persist_result=self.outputs is not None,
            result_serializer="json",
        )


def _task_body(
    function: Callable[..., R], outputs: Callable[..., Any] | None, uses_random_numbers: bool
) -> Callable[..., R]:
    """The function that Prefect calls: the same parameters, with a URL in the run's place."""

    @functools.wraps(function)
    def body(run_url: str, *args: Any, **kwargs: Any) -> R:
        return _perform(function, outputs, uses_random_numbers, run_url, args, kwargs)

    signature = inspect.signature(function)
    _, *others = signature.parameters.values()
    url = inspect.Parameter("run_url", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=str)
    body.__signature__ = signature.replace(parameters=[url, *others])  # type: ignore[attr-defined]
    return body


def _perform(
    function: Callable[..., R],
    outputs: Callable[..., Any] | None,
    uses_random_numbers: bool,
    run_url: str,
    args: Any,
    kwargs: Any,
) -> R:
    """Run the function, then store its result under the key that belongs to the new outputs."""
    from secateur.tasks.engine.prefect_internals import interruptible_thread, store_result_under

    lock = _random_numbers_lock if uses_random_numbers else nullcontext()
    with lock, interruptible_thread():
        result = function(Run.open(run_url), *args, **kwargs)
    if outputs:
        inputs = _named_arguments(function, (run_url, *args), kwargs)
        store_result_under(_cache_key(function, outputs, inputs))
    return result


def _named_arguments(function: Callable[..., Any], args: Any, kwargs: Any) -> dict[str, Any]:
    """Every argument by name, defaults included; the first one is the run's URL.

    Prefect names the first one `run_url`, as in the task's body. The function names it `run`.
    """
    first = next(iter(inspect.signature(function).parameters))
    named = {first if name == "run_url" else name: value for name, value in kwargs.items()}
    bound = inspect.signature(function).bind(*args, **named)
    bound.apply_defaults()
    return dict(bound.arguments)


def _cache_key(
    function: Callable[..., Any], outputs: Callable[..., Any] | None, inputs: dict[str, Any]
) -> str | None:
    """The key of a result: the task, its arguments, and its outputs as they are now.

    A result is stored only after the outputs are written. So if an output is missing, the key is
    one that no result has, and the task runs.
    """
    assert outputs is not None
    run_url, *others = _named_arguments(function, (), inputs).values()
    try:
        written = outputs(Run.open(run_url), *others)
        listed = [written] if isinstance(written, Output) else list(written)
        state = [
            [one.root.url, *([one.fingerprint, one.manifest.attempt] if one.committed else [])]
            for one in listed
        ]
    except ValueError:  # the task itself will say what is wrong
        return None
    values = TypeAdapter(Any).dump_python([run_url, *others], mode="json", fallback=str)
    content = json.dumps([f"{function.__module__}.{function.__qualname__}", values, state])
    return f"secateur-{hashlib.sha256(content.encode()).hexdigest()}"


def _task_run_name(name: str, parameters: dict[str, Any]) -> str:
    """The name of a task run: `train, stage 0`, `rewrite shard, stage 0, number 3`."""
    numbers = [f"{key} {value}" for key, value in parameters.items() if isinstance(value, int)]
    return ", ".join([name, *numbers])


def _should_retry(task: Task[..., Any], run: TaskRun, state: State[Any]) -> bool:
    """Whether the cause of a failure may pass by itself."""
    if not isinstance(state.data, UnavailableError):
        return False
    print_status(f"{task.name}: {state.data}; trying again")
    return True

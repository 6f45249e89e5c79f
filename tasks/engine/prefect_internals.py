"""Everything that relies on how Prefect works inside, in one place.

Prefect's public interface does not cover what is here, so a new version of Prefect may break it.
Each function says why it is needed. `tests/tasks/engine` exercises all of them on a real server.
"""

from __future__ import annotations

import ctypes
import logging
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

# Prefect is imported within the functions, because a command starts its own server before it spends
# the seconds that these imports take.
if TYPE_CHECKING:
    from prefect import Task
    from prefect.task_runners import TaskRunner
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

# How long to wait for a future before looking whether the main thread was interrupted.
SECONDS_PER_TURN = 1.0

_task_threads: set[int] = set()  # threads besides the main one that run tasks


class TaskInterrupted(BaseException):
    """Raised in a thread that runs a task, because its flow run was interrupted."""


def store_result_under(key: str | None) -> None:
    """Store the running task's result under another cache key than it was looked up by.

    A task's key holds the fingerprints of its outputs, and these are known only once the task has
    made them. Prefect computes a key before the task runs, so the transaction's key is replaced.
    """
    from prefect.transactions import get_transaction

    transaction = get_transaction()
    if transaction is not None:
        transaction.key = key


@contextmanager
def interruptible_thread() -> Iterator[None]:
    """Let `interrupt_threads` interrupt this thread within the block, unless it is the main one."""
    thread = threading.get_ident()
    if thread == threading.main_thread().ident or thread in _task_threads:
        yield
        return
    _task_threads.add(thread)
    try:
        yield
    finally:
        _task_threads.discard(thread)


def interrupt_threads() -> None:
    """Interrupt every task that another thread of this process runs, at its next instruction.

    Prefect's thread runner waits for its threads when a flow is cancelled. A signal reaches only
    the main thread, so an exception is raised in the others, and what they were writing is removed.
    """
    for thread in list(_task_threads):
        exception = ctypes.py_object(TaskInterrupted)
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), exception)


def start_runner(runner: TaskRunner[Any]) -> None:
    """Start a task runner outside a flow's decorator.

    A flow has one task runner, fixed when the flow is defined. Ours depends on the plan, which is
    an argument of the flow, so the runner is entered by hand.
    """
    runner.__enter__()
    # Dask's client connects only when it is first read; a wrong address must fail now.
    getattr(runner, "client", None)


def stop_runner(runner: TaskRunner[Any]) -> None:
    """Stop a runner that `start_runner` started, and wait for its tasks."""
    runner.__exit__(None, None, None)


def submit_task(runner: TaskRunner[Any], task: Task[..., Any], arguments: tuple[Any, ...]) -> Any:
    """Submit a task to a runner that is not the flow's own, and return its future."""
    from prefect.utilities.callables import get_call_parameters

    return runner.submit(task, get_call_parameters(task.fn, arguments, {}))


def wait_for_future(future: Any) -> None:
    """Wait for a task's future, and raise what the task raised.

    It waits in short turns, because a main thread that waits without a limit does not notice an
    interruption.
    """
    while True:
        try:
            future.result(timeout=SECONDS_PER_TURN)
            return
        except TimeoutError:
            # Either the turn is over, or the task ended just then, or it timed out itself.
            if future.state.is_final():
                future.result()
                return


def send_events(timeout: float) -> None:
    """Send the events that wait in this process's queue.

    Prefect sends them at the interpreter's exit, when a server of our own is already gone.
    """
    from prefect.events.worker import EventsWorker

    EventsWorker.drain_all(timeout=timeout, at_exit=False)


def is_shown_on_console(logger: logging.Logger | None) -> bool:
    """Return whether Prefect prints a logger's INFO messages on stderr."""
    from prefect.logging.handlers import PrefectConsoleHandler

    while logger is not None:
        for handler in logger.handlers:
            if isinstance(handler, PrefectConsoleHandler) and handler.level <= logging.INFO:
                return True
        logger = logger.parent if logger.propagate else None
    return False


# The variables that Prefect sets for a server that it starts by itself (an ephemeral one).
OWN_SERVER_ENVIRONMENT = {
    "PREFECT_UI_ENABLED": "0",
    "PREFECT__SERVER_EPHEMERAL": "1",
    "PREFECT__SERVER_FINAL": "1",
}
BUSY = 503
SECONDS_BEFORE_RETRY = b"0.25"


def serve_api(descriptor: int) -> None:
    """Serve Prefect's API on an open socket, until the process that started this one ends.

    That process holds the other end of stdin, so a killed command leaves no server behind.
    """
    import uvicorn
    from prefect.server.api.server import create_app

    def exit_with_parent() -> None:
        sys.stdin.buffer.read()
        os._exit(0)

    threading.Thread(target=exit_with_parent, daemon=True).start()
    app = with_retry_after(create_app())
    uvicorn.run(app, fd=descriptor, log_level="error", lifespan="on")


def with_retry_after(app: ASGIApp) -> ASGIApp:
    """Tell clients to retry soon when the server refuses a request because its database is busy.

    SQLite refuses requests while another one writes, which happens to about every third task that
    has tags. Prefect's clients wait two seconds or more unless the answer says how long.
    """

    async def serve(scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_header(message: Message) -> None:
            if message["type"] == "http.response.start" and message["status"] == BUSY:
                header = (b"retry-after", SECONDS_BEFORE_RETRY)
                message["headers"] = [*message.get("headers", []), header]
            await send(message)

        await app(scope, receive, send_with_header)

    return serve

"""Show the progress of long work.

A terminal gets a bar, other output a line now and then, always on stderr. Within a Prefect run the
lines also go to the run's log.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

T = TypeVar("T")

SECONDS_BETWEEN_LINES = 10.0
SECONDS_WITHOUT_LINE = 2.0  # work that is done within these gets no line


def track(items: Iterable[T], label: str, total: int, done: int = 0) -> Iterator[T]:
    """Yield `items`, and show how many of `total` are finished.

    Args:
        done: how many were finished before.
    """
    on_terminal = sys.stderr.isatty()
    # rich cannot show two bars of two threads, so only the main thread has one.
    if on_terminal and threading.current_thread() is threading.main_thread():
        yield from _with_bar(items, label, total, done)
    else:
        yield from _with_lines(items, label, total, done, print_status)


def _with_bar(items: Iterable[T], label: str, total: int, done: int) -> Iterator[T]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task(label, total=total, completed=done)
        for item in _with_lines(items, label, total, done, log_to_prefect):
            yield item
            progress.advance(bar)


def _with_lines(
    items: Iterable[T], label: str, total: int, done: int, write_line: Callable[[str], Any]
) -> Iterator[T]:
    start = last_line = time.monotonic()
    for count, item in enumerate(items, done + 1):
        yield item
        now = time.monotonic()
        if now - start > SECONDS_WITHOUT_LINE and now - last_line > SECONDS_BETWEEN_LINES:
            last_line = now
            write_line(f"{label}: {count} of {total}")


def print_status(sentence: str) -> None:
    """Print a line on stderr and write it to the run's log.

    It is printed once, even if Prefect prints the log on stderr too.
    """
    if not log_to_prefect(sentence):
        print(sentence, file=sys.stderr, flush=True)


def log_to_prefect(sentence: str) -> bool:
    """Write a line to the log of the current Prefect run, if there is one.

    Returns:
        Whether Prefect prints it on stderr.
    """
    # A recording in a user's own loop does not import Prefect; then there is no Prefect run.
    if "prefect" not in sys.modules:
        return False
    from prefect.context import FlowRunContext, TaskRunContext
    from prefect.logging import get_run_logger

    from secateur.tasks.engine.prefect_internals import is_shown_on_console

    if TaskRunContext.get() is None and FlowRunContext.get() is None:
        return False
    logger: Any = get_run_logger()
    logger.info(sentence)
    own_logger = getattr(logger, "logger", logger)
    return bool(logger.isEnabledFor(logging.INFO)) and is_shown_on_console(own_logger)

"""Room `tasks`: progress of long work: a bar on a terminal, a plain line now and then elsewhere, always on stderr; and in the
run's log where a Prefect server keeps one."""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

from prefect.context import FlowRunContext, TaskRunContext
from prefect.logging import get_run_logger
from prefect.logging.handlers import PrefectConsoleHandler
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

T = TypeVar("T")

SECONDS_BETWEEN_LINES = 10.0
SECONDS_UNSHOWN = 2.0


def track(items: Iterable[T], label: str, total: int, done: int = 0) -> Iterator[T]:
    """Hands on `items`, showing how many of `total` are through, `done` of them before it began."""
    if sys.stderr.isatty() and threading.current_thread() is threading.main_thread():
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
            bar = progress.add_task(label, total=total, completed=done)
            for item in _told(items, label, total, done, log_to_prefect):
                yield item
                progress.advance(bar)
        return
    yield from _told(items, label, total, done, print_status)


def _told(items: Iterable[T], label: str, total: int, done: int, tell: Any) -> Iterator[T]:
    """The items, with a line now and then."""
    start = shown = time.monotonic()
    for count, item in enumerate(items, done + 1):
        yield item
        now = time.monotonic()
        if now - start > SECONDS_UNSHOWN and now - shown > SECONDS_BETWEEN_LINES:
            shown = now
            tell(f"{label}: {count} of {total}")


def print_status(sentence: str) -> None:
    """A line on stderr, and in the run's log; once where Prefect shows that log on stderr too."""
    if not log_to_prefect(sentence):
        print(sentence, file=sys.stderr, flush=True)


def log_to_prefect(sentence: str) -> bool:
    """A line in the log of the Prefect run that this is within, if there is one.

    Returns:
        Whether Prefect shows it on stderr.
    """
    if TaskRunContext.get() is None and FlowRunContext.get() is None:
        return False
    logger: Any = get_run_logger()
    logger.info(sentence)
    return logger.isEnabledFor(logging.INFO) and _on_console(getattr(logger, "logger", logger))


def _on_console(logger: logging.Logger | None) -> bool:
    """Whether a logger's messages reach the terminal."""
    while logger is not None:
        if any(
            isinstance(h, PrefectConsoleHandler) and h.level <= logging.INFO
            for h in logger.handlers
        ):
            return True
        logger = logger.parent if logger.propagate else None
    return False

"""Room `tasks`: progress of long work: a bar on a terminal, a plain line now and then elsewhere, always on stderr."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

T = TypeVar("T")

SECONDS_BETWEEN_LINES = 10.0
SECONDS_UNSHOWN = 2.0


def track(items: Iterable[T], label: str, total: int, done: int = 0) -> Iterator[T]:
    """Hands on `items`, showing how many of `total` are through, `done` of them before it began."""
    if sys.stderr.isatty():
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
            bar = progress.add_task(label, total=total, completed=done)
            for item in items:
                yield item
                progress.advance(bar)
        return
    start = shown = time.monotonic()
    for count, item in enumerate(items, done + 1):
        yield item
        now = time.monotonic()
        if now - start > SECONDS_UNSHOWN and now - shown > SECONDS_BETWEEN_LINES:
            shown = now
            print(f"{label}: {count} of {total}", file=sys.stderr, flush=True)

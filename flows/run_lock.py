"""Room `flows`: one flow run at a time on a run's folder."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import GlobalConcurrencyLimitCreate
from prefect.concurrency.sync import concurrency
from prefect.exceptions import ObjectAlreadyExists

from secateur.tasks.engine.prefect_server import has_lasting_server
from secateur.tasks.run.run import Run

LEASE_SECONDS = (
    60.0  # the least that Prefect takes; a killed flow run keeps others waiting no longer
)


@contextmanager
def exclusive_run(run: Run) -> Iterator[None]:
    """Waits until no other flow run works on the run's folder, and keeps others waiting within the block.

    A Prefect concurrency limit of 1 holds it, so flow runs of one server wait for one another; without a server nothing
    does. Commits are safe either way: of two that make the same thing one stands, and only the work is done twice.
    """
    if not has_lasting_server():
        yield
        return
    name = limit_name(run)
    with get_client(sync_client=True) as client, suppress(ObjectAlreadyExists):
        client.create_global_concurrency_limit(GlobalConcurrencyLimitCreate(name=name, limit=1))
    with concurrency(
        name, lease_duration=LEASE_SECONDS, strict=True, raise_on_lease_renewal_failure=False
    ):
        yield


def limit_name(run: Run) -> str:
    """Name of the limit: the run's, and what tells runs of that name under other roots from it."""
    return f"secateur-{run.plan.run}-{hashlib.sha256(absolute_url(run).encode()).hexdigest()[:8]}"


def absolute_url(run: Run) -> str:
    """The run's URL, or its path from the disk's root, which other processes with other working folders can use."""
    root = run.folder.root
    return str(root.local_path("").resolve()) if root.is_local else root.url

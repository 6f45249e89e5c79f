"""Let only one flow run at a time work on a run's folder."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from secateur.tasks.engine.prefect_server import has_lasting_server
from secateur.tasks.run import Run

# The shortest lease that Prefect allows. After a flow run is killed, others wait this long.
LEASE_SECONDS = 60.0


@contextmanager
def exclusive_run(run: Run) -> Iterator[None]:
    """Wait until no other flow run works on the run's folder, and keep others waiting.

    A Prefect concurrency limit of 1 does that, so only flow runs of one server wait for one
    another. Commits are safe without it: if two flow runs make the same output, one of them is
    committed, and the work was only done twice.
    """
    if not has_lasting_server():
        yield
        return
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.actions import GlobalConcurrencyLimitCreate
    from prefect.concurrency.sync import concurrency
    from prefect.exceptions import ObjectAlreadyExists

    name = limit_name(run)
    with get_client(sync_client=True) as client, suppress(ObjectAlreadyExists):
        limit = GlobalConcurrencyLimitCreate(name=name, limit=1)
        client.create_global_concurrency_limit(limit)
    with concurrency(
        name,
        lease_duration=LEASE_SECONDS,
        strict=True,
        raise_on_lease_renewal_failure=False,
    ):
        yield


def limit_name(run: Run) -> str:
    """Return the limit's name: the run's, and a hash that tells apart runs under other roots."""
    digest = hashlib.sha256(absolute_url(run).encode()).hexdigest()[:8]
    return f"secateur-{run.plan.run}-{digest}"


def absolute_url(run: Run) -> str:
    """Return the run's URL, or its absolute path, which processes in other folders can use."""
    root = run.folder.root
    return str(root.local_path("").resolve()) if root.is_local else root.url

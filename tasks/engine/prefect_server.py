"""The Prefect server that a command uses: the configured one, or its own while it runs.

Prefect would start a server when one is first needed, and then wait for it. Ours starts first and
gets ready while the command imports the rest. The processes that a run starts use it too, and it
ends with the command, however that ends.
"""

from __future__ import annotations

import importlib
import os
import socket
import subprocess
import sys
import tempfile
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from secateur.errors import PlanError

# The first start creates a database, and a busy machine is slow.
SECONDS_TO_START = 180.0
SECONDS_TO_STOP = 5.0


def has_lasting_server() -> bool:
    """Return whether a Prefect server is configured that outlives this command.

    Only then do others look at the run's log and artifacts, or wait for its events.
    """
    from prefect.settings import get_current_settings

    settings = get_current_settings()
    return settings.api.url is not None and settings.logging.to_api.enabled


@contextmanager
def prefect_server(preload: Sequence[str] = ()) -> Iterator[None]:
    """Use the configured server (PREFECT_API_URL, or Prefect's profile), or one of our own.

    Args:
        preload: modules to import while our own server starts.

    Raises:
        PlanError: ours does not start, or nothing answers at the configured address.
    """
    from prefect.settings import get_current_settings

    if configured := get_current_settings().api.url:
        if _is_refused(configured):
            raise PlanError(
                f"no Prefect server answers at {configured}; start it, or unset PREFECT_API_URL"
            )
        yield
        return
    with _listening_socket() as listener, tempfile.TemporaryFile() as errors:
        server = _start_server(listener, errors)
        try:
            port = listener.getsockname()[1]
            listener.close()  # the server has inherited it
            _use_server(f"http://127.0.0.1:{port}/api", errors, preload)
            try:
                yield
            finally:
                from secateur.tasks.engine.prefect_internals import send_events

                send_events(SECONDS_TO_STOP)
        finally:
            _stop_server(server)


def _listening_socket() -> socket.socket:
    """A socket on a free port. Clients that connect before the server is ready wait."""
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen(128)
    listener.set_inheritable(True)
    return listener


def _start_server(listener: socket.socket, errors: IO[bytes]) -> subprocess.Popen[bytes]:
    from secateur.tasks.engine.prefect_internals import OWN_SERVER_ENVIRONMENT

    descriptor = listener.fileno()
    return subprocess.Popen(
        [sys.executable, "-m", "secateur.tasks.engine.prefect_server", str(descriptor)],
        stdin=subprocess.PIPE,
        stdout=errors,
        stderr=errors,
        pass_fds=[descriptor],
        close_fds=True,
        # Ctrl-C must not reach the server: the command still has to report the interruption to it.
        start_new_session=True,
        env=os.environ | OWN_SERVER_ENVIRONMENT,
    )


def _use_server(url: str, errors: IO[bytes], preload: Sequence[str]) -> None:
    """Wait until the server answers, and make it this process's and its children's server."""
    from prefect.context import refresh_global_settings_context

    os.environ["PREFECT_API_URL"] = url
    # Nobody could read logs that are stored in a server which ends with the command.
    os.environ["PREFECT_LOGGING_TO_API_ENABLED"] = "false"
    refresh_global_settings_context()
    with ThreadPoolExecutor(1) as executor:
        answer = executor.submit(_answers, url)
        for module in preload:
            importlib.import_module(module)
    if not answer.result():
        errors.seek(0)
        output = errors.read().decode(errors="replace").strip().splitlines()
        reason = output[-1] if output else "it printed nothing"
        home = os.environ.get("PREFECT_HOME", str(Path.home() / ".prefect"))
        raise PlanError(
            f"Prefect's server does not start ({reason}); check that {home} can be written and "
            f"holds no damaged prefect.db, or set PREFECT_API_URL to a server"
        )


def _answers(url: str) -> bool:
    """Whether a server answers. If the answer is an error, Prefect will explain it."""
    try:
        urllib.request.urlopen(f"{url}/health", timeout=SECONDS_TO_START).close()
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False
    return True


def _is_refused(url: str) -> bool:
    """Whether nothing listens at an address."""
    parts = urllib.parse.urlsplit(url)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    try:
        socket.create_connection((parts.hostname or "", port), 5).close()
    except ConnectionRefusedError:
        return True
    except OSError:
        return False  # a proxy may know how to reach it
    return False


def _stop_server(server: subprocess.Popen[bytes]) -> None:
    server.terminate()
    try:
        server.wait(SECONDS_TO_STOP)
    except subprocess.TimeoutExpired:
        server.kill()
        server.wait()


if __name__ == "__main__":
    from secateur.tasks.engine.prefect_internals import serve_api

    serve_api(int(sys.argv[1]))

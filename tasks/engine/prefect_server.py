"""Room `flows`: a Prefect server of the command's own, where none is configured, for as long as the command runs.

Prefect would start one by itself, once it is wanted, and then wait for it. This one starts first and gets ready while the
command imports the rest; the processes that a run starts use it too; and nothing is left of it, however the command ends.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING

from secateur.errors import PlanError

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

PATIENCE = 180.0  # its first start makes a database; a busy machine is slow
SECONDS_TO_END = 5.0
BUSY, SECONDS_BUSY = 503, b"0.25"


def has_lasting_server() -> bool:
    """Whether there is a Prefect server that stays: others wait for a run there, and look at its log and artifacts."""
    from prefect.settings import get_current_settings

    settings = get_current_settings()
    return settings.api.url is not None and settings.logging.to_api.enabled


@contextmanager
def prefect_server() -> Iterator[None]:
    """The configured server (PREFECT_API_URL, or Prefect's profile), or one of our own within the block.

    Raises:
        PlanError: ours does not start, or nothing listens where the configured one should be.
    """
    from prefect.settings import get_current_settings

    if configured := get_current_settings().api.url:
        if _refused(configured):
            raise PlanError(
                f"no Prefect server answers at {configured}; start it, or unset PREFECT_API_URL"
            )
        yield
        return
    with _listening() as listener, tempfile.TemporaryFile() as errors:
        server = _start(listener, errors)
        try:
            port = listener.getsockname()[1]
            listener.close()  # the server has its own hold on it
            _use(f"http://127.0.0.1:{port}/api", server, errors)
            try:
                yield
            finally:
                _settle()
        finally:
            _end(server)


def _listening() -> socket.socket:
    """A socket on a free port: who connects before the server is ready waits."""
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen(128)
    listener.set_inheritable(True)
    return listener


def _start(listener: socket.socket, errors: IO[bytes]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "secateur.tasks.engine.prefect_server", str(listener.fileno())],
        stdin=subprocess.PIPE, stdout=errors, stderr=errors, pass_fds=[listener.fileno()], close_fds=True,
        start_new_session=True,  # Ctrl-C is for the command, which has something to tell the server then
        env=os.environ | {"PREFECT_UI_ENABLED": "0", "PREFECT__SERVER_EPHEMERAL": "1", "PREFECT__SERVER_FINAL": "1"},
    )  # fmt: skip


def _use(url: str, server: subprocess.Popen[bytes], errors: IO[bytes]) -> None:
    """Waits until the server answers while the rest is imported, and makes it this process's and its children's."""
    from prefect.context import refresh_global_settings_context

    os.environ["PREFECT_API_URL"] = url
    os.environ["PREFECT_LOGGING_TO_API_ENABLED"] = (
        "false"  # nobody reads what a server keeps that is gone in the end
    )
    refresh_global_settings_context()
    with ThreadPoolExecutor(1) as beside:
        answered = beside.submit(_answers, url)

    if not answered.result():
        errors.seek(0)
        last = errors.read().decode(errors="replace").strip().splitlines()[-1:]
        home = os.environ.get("PREFECT_HOME", str(Path.home() / ".prefect"))
        raise PlanError(
            f"Prefect's server does not start ({''.join(last) or 'it says nothing'}); see that {home} can be written and holds "
            f"no damaged prefect.db, or set PREFECT_API_URL to a server"
        )


def _answers(url: str) -> bool:
    """Whether anything but silence comes from a server; an answer that means no is for Prefect to explain."""
    try:
        urllib.request.urlopen(f"{url}/health", timeout=PATIENCE).close()
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False
    return True


def _refused(url: str) -> bool:
    where = urllib.parse.urlsplit(url)
    try:
        socket.create_connection(
            (where.hostname or "", where.port or (443 if where.scheme == "https" else 80)), 5
        ).close()
    except ConnectionRefusedError:
        return True
    except OSError:
        return False  # a proxy may know the way
    return False


def _settle() -> None:
    """Sends what is still to be told; Prefect would at the interpreter's end, when the server is gone."""
    from prefect.events.worker import EventsWorker

    EventsWorker.drain_all(timeout=SECONDS_TO_END, at_exit=False)


def _end(server: subprocess.Popen[bytes]) -> None:
    server.terminate()
    try:
        server.wait(SECONDS_TO_END)
    except subprocess.TimeoutExpired:
        server.kill()
        server.wait()


def _serve(descriptor: int) -> None:
    """The server's process, which ends with the one that started it: a killed command leaves none behind."""
    import uvicorn
    from prefect.server.api.server import create_app

    threading.Thread(target=lambda: (sys.stdin.buffer.read(), os._exit(0)), daemon=True).start()
    uvicorn.run(with_retry_after(create_app()), fd=descriptor, log_level="error", lifespan="on")


def with_retry_after(app: ASGIApp) -> ASGIApp:
    """A server whose clients ask again soon for what it refused while another had its database, which happens to every third
    task or so that has tags: Prefect's clients wait two seconds and more, unless the answer says how long."""

    async def serve(scope: Scope, receive: Receive, send: Send) -> None:
        async def say(message: Message) -> None:
            if message["type"] == "http.response.start" and message["status"] == BUSY:
                message["headers"] = [*message.get("headers", []), (b"retry-after", SECONDS_BUSY)]
            await send(message)

        await app(scope, receive, say)

    return serve


if __name__ == "__main__":
    _serve(int(sys.argv[1]))

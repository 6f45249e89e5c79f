"""Train a stage in several processes, which torchrun starts and which end with this one.

The processes share a temporary folder with the one that starts them: `alive`, a pipe that closes
when the starting process ends, however it ends; `steps`, which grows by one byte per step; and what
went wrong, as `error-<rank>.json` of a process and `failures.json` of torchrun.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from secateur import errors
from secateur.errors import SecateurError
from secateur.tasks.plan import LaunchConfig
from secateur.tasks.run import Run

ALIVE = "alive"
STEPS = "steps"
FAILURES = "failures.json"
POLL = 0.1  # seconds
# torchrun gives its processes 30 seconds to end.
SECONDS_TO_END = 40.0


def train_in_processes(
    run: Run, stage: int, launch: LaunchConfig, done: int
) -> Generator[int, None, None]:
    """Train a stage to its end in several processes, and yield each step that is done.

    The processes end if the generator is closed or interrupted.

    Args:
        done: the steps that were done before.

    Raises:
        SecateurError: what one of the processes raised, or that one was killed.
    """
    with tempfile.TemporaryDirectory(prefix="secateur-") as name, _pipe(Path(name, ALIVE)):
        folder = Path(name)
        (folder / STEPS).touch()
        agent = _start(run, stage, launch, folder)
        try:
            yield from _follow(agent, folder / STEPS, done)
        finally:
            _end(agent)
        if agent.returncode:
            raise _explain_failure(run, stage, launch, folder)


@contextmanager
def _pipe(path: Path) -> Iterator[None]:
    """Hold a named pipe open within the block. Its readers notice when this process ends."""
    os.mkfifo(path)
    # Open for both directions, because opening for writing alone would wait for a reader.
    descriptor = os.open(path, os.O_RDWR)
    try:
        yield
    finally:
        os.close(descriptor)


def _start(run: Run, stage: int, launch: LaunchConfig, folder: Path) -> subprocess.Popen[bytes]:
    settings = [run.url, str(stage), launch.shard, str(folder)]
    threads = run.plan.threads or max(1, (os.cpu_count() or 1) // launch.processes)
    environment = {
        # Factories of the plan may be in any folder that this process imports from.
        "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
        "OMP_NUM_THREADS": str(threads),
        "TORCH_CPP_LOG_LEVEL": "ERROR",
    }
    return subprocess.Popen(
        [
            sys.executable,
            "-m",
            "secateur.tasks.training.launch_agent",
            str(launch.processes),
            *settings,
        ],
        # Results of a command are on stdout, so what models and tasks print goes to stderr.
        stdout=sys.__stderr__,
        # Ctrl-C reaches only this process, which then ends the others.
        start_new_session=True,
        env=os.environ | environment,
    )


def _follow(agent: subprocess.Popen[bytes], steps: Path, done: int) -> Iterator[int]:
    """Yield the number of each step once it is done, until the processes have ended."""
    seen = 0
    # Short sleeps, because an interruption reaches a thread between two instructions.
    while True:
        has_ended = agent.poll() is not None
        count = steps.stat().st_size
        yield from range(done + seen, done + count)
        seen = count
        if has_ended:
            return
        time.sleep(POLL)


def _end(agent: subprocess.Popen[bytes]) -> None:
    """End torchrun, which ends its processes first."""
    if agent.poll() is None:
        agent.terminate()
        try:
            agent.wait(SECONDS_TO_END)
        except subprocess.TimeoutExpired:
            agent.kill()  # the closed pipe ends the others
            agent.wait()


def _explain_failure(run: Run, stage: int, launch: LaunchConfig, folder: Path) -> Exception:
    """The error that explains best why the processes ended.

    When one process fails, those that wait for it fail too, so the first error is the cause.
    """
    paths = sorted(folder.glob("error-*.json"), key=lambda path: path.stat().st_mtime_ns)
    found = [json.loads(path.read_text()) for path in paths]
    for error in found:
        if kind := getattr(errors, error["kind"], None):
            own: SecateurError = kind(error["message"])
            return own
    place = f"that trained stage {stage} of {run.url}"
    failures = _read_failures(folder)
    for rank, code in failures.items():
        if code < 0:
            name = signal.Signals(-code).name
            hint = ", often for lack of memory" if name == "SIGKILL" else ""
            return SecateurError(
                f"process {rank} of the {launch.processes} {place} was ended by {name}{hint}; run "
                f"the same command again, which continues after the last whole segment"
            )
    if found:
        return RuntimeError(f"a process {place} failed:\n{found[0]['traceback']}")
    return SecateurError(
        f"the {launch.processes} processes {place} ended early; run the same command again, which "
        f"continues after the last whole segment"
    )


def _read_failures(folder: Path) -> dict[str, Any]:
    path = folder / FAILURES
    failures: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return failures

"""Interrupt a run while it writes: nothing is left half-written, and the same command continues."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from secateur.storage.folder import Folder
from secateur.storage.integrity import find_stray_files, verify_folder
from secateur.tasks.run import Run
from tests.flows.test_cli import write_plan
from tests.tasks.small import curate_small, make_data, small_plan
from tests.tasks.test_run import differing

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_ctrl_c_and_sigterm_in_the_middle_of_pruning(
    tmp_path: Path, number: signal.Signals, code: int
) -> None:
    make_data(tmp_path)
    plan = write_plan(tmp_path)
    writing = tmp_path / "writing"
    command = [sys.executable, "-m", "tests.flows.interrupted", "run", plan]
    environment = {
        k: v for k, v in os.environ.items() if not k.startswith("PREFECT_") or k == "PREFECT_HOME"
    }
    # Not a pipe, because that would stay open if the command left a process behind.
    with open(tmp_path / "errors", "w") as errors:
        running = subprocess.Popen(
            command, stdout=errors, stderr=errors, env=environment | {"WRITING": str(writing)}
        )
    while not writing.exists():
        assert running.poll() is None, (tmp_path / "errors").read_text()
        time.sleep(0.1)
    running.send_signal(number)
    assert running.wait(timeout=120) == code
    printed = (tmp_path / "errors").read_text()
    assert "interrupted; the same command continues after the last whole segment" in printed
    assert "Traceback" not in printed
    run = Folder(f"{tmp_path}/runs/small")
    assert not (tmp_path / "runs/small/stages/00/prune/plan/manifest.json").exists()
    assert find_stray_files(run) == []
    curate_small(small_plan(tmp_path))
    assert list(verify_folder(run)) == []
    whole = curate_small(small_plan(tmp_path, root=f"{tmp_path}/whole"))
    assert differing(whole, Run.open(run.url)) == []

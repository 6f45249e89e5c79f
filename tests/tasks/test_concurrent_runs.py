"""Two processes that run the same plan at once: each ends with the whole run or with one sentence, and the run is the same as one
process's."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from secateur.storage.folder import Folder
from secateur.storage.integrity import remove_stray_files, verify_folder
from secateur.tasks.run.run import Run
from tests.tasks.small import curate_small, make_data, small_plan, values
from tests.tasks.test_run import differing

TOGETHER = """
import json, sys, time
from pathlib import Path
from storage.errors import StorageError
from tasks.errors import PlanError
from tasks.plan import Plan
from tests.tasks.small import curate
plan, meeting, name = Plan.model_validate(json.loads(sys.argv[1])), Path(sys.argv[2]), sys.argv[3]
(meeting / name).touch()
while len(list(meeting.iterdir())) < 2:
    time.sleep(0.001)
try:
    curate(plan)
except (StorageError, PlanError) as error:
    print(error)
"""


@pytest.mark.parametrize("store", ["local", pytest.param("seaweedfs", marks=pytest.mark.slow)])
def test_two_processes_at_once(store: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    make_data(tmp_path)
    root = (
        str(tmp_path / "runs")
        if store == "local"
        else f"{request.getfixturevalue(store)}/{tmp_path.name}"
    )
    (tmp_path / "meeting").mkdir()
    words = json.dumps(values(tmp_path, root=root)), str(tmp_path / "meeting")
    both = [
        subprocess.Popen(
            [sys.executable, "-c", TOGETHER, *words, name], stdout=subprocess.PIPE, text=True
        )
        for name in "xy"
    ]
    told = [process.communicate()[0].splitlines() for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert [] in told  # one at least ended with the whole run
    assert all(len(lines) <= 1 for lines in told)
    run = Folder(f"{root}/small")
    remove_stray_files(run)
    assert list(verify_folder(run)) == []
    whole = curate_small(small_plan(tmp_path, root=f"{tmp_path}/whole"))
    assert differing(whole, Run.open(run.url)) == []

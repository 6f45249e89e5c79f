"""Two processes that run the same plan at the same time."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from secateur.storage.folder import Folder
from secateur.storage.integrity import remove_stray_files, verify_folder
from secateur.tasks.run import Run
from tests.tasks.small import curate_small, make_data, small_plan, values
from tests.tasks.test_run import differing

RUN_WITH_ANOTHER = """
import json, sys, time
from pathlib import Path
from secateur.errors import PlanError, StorageError
from secateur.tasks.plan import Plan
from tests.tasks.small import curate_small
plan, meeting, name = Plan.model_validate(json.loads(sys.argv[1])), Path(sys.argv[2]), sys.argv[3]
(meeting / name).touch()
while len(list(meeting.iterdir())) < 2:
    time.sleep(0.001)
try:
    curate_small(plan)
except (StorageError, PlanError) as error:
    print(error)
"""


@pytest.mark.parametrize("store", ["local", pytest.param("seaweedfs", marks=pytest.mark.slow)])
def test_two_processes_write_the_run_that_one_would(
    store: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """Each ends with the whole run or with one sentence."""
    make_data(tmp_path)
    root = (
        str(tmp_path / "runs")
        if store == "local"
        else f"{request.getfixturevalue(store)}/{tmp_path.name}"
    )
    (tmp_path / "meeting").mkdir()
    arguments = [json.dumps(values(tmp_path, root=root)), str(tmp_path / "meeting")]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", RUN_WITH_ANOTHER, *arguments, name],
            stdout=subprocess.PIPE,
            text=True,
        )
        for name in "xy"
    ]
    messages = [process.communicate()[0].splitlines() for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert [] in messages  # at least one ended with the whole run
    assert all(len(lines) <= 1 for lines in messages)
    run = Folder(f"{root}/small")
    remove_stray_files(run)
    assert list(verify_folder(run)) == []
    whole = curate_small(small_plan(tmp_path, root=f"{tmp_path}/whole"))
    assert differing(whole, Run.open(run.url)) == []

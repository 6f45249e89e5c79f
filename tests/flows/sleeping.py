"""A task that says which process it is in, and takes long."""

from __future__ import annotations

import os
import time
from pathlib import Path

from secateur.tasks.engine.prefect_task import pipeline_task


@pipeline_task("sleep")
def sleeping(run_url: str) -> None:
    Path(run_url).write_text(str(os.getpid()))
    for _ in range(6000):
        time.sleep(0.1)

"""A pipeline task that writes the number of its process to a file, and then sleeps long."""

from __future__ import annotations

import os
import time
from pathlib import Path

from secateur.tasks.engine.pipeline_task import PipelineTask
from secateur.tasks.run import Run


def write_process_id(run: Run, path: str) -> None:
    """Write the id of this process to `path`, and sleep ten minutes."""
    Path(path).write_text(str(os.getpid()))
    # Short sleeps, because an interruption reaches a thread between two instructions.
    for _ in range(6000):
        time.sleep(0.1)


sleep = PipelineTask("sleep", write_process_id)

"""One thread, and a Prefect that stays offline and keeps its state out of the user's home."""

from __future__ import annotations

import os
import tempfile

os.environ.update(
    PREFECT_HOME=tempfile.mkdtemp(prefix="prefect-"),
    PREFECT_SERVER_ANALYTICS_ENABLED="false",
    DO_NOT_TRACK="1",
    PREFECT_LOGGING_LEVEL="CRITICAL",
    PREFECT_SERVER_LOGGING_LEVEL="CRITICAL",
    OMP_NUM_THREADS="1",
)

import torch

torch.set_num_threads(1)

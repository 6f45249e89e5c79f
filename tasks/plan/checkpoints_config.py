"""Settings of the checkpoints that a run keeps."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from secateur.tasks.plan.base import Config


class CheckpointsConfig(Config):
    """Which checkpoints stay on disk."""

    keep: Literal["segments", "stage_ends"] = Field(
        "segments",
        description="`segments`: one per segment; `stage_ends`: those at a stage's start and end. "
        "The others are removed once training, and what the plan reads them for, has gone on",
    )

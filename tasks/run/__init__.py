"""An opened run, and the user's model and learning task that its plan names."""

from __future__ import annotations

from secateur.tasks.run.factories import LearningTask, call_factory
from secateur.tasks.run.run import Run

__all__ = ["LearningTask", "Run", "call_factory"]

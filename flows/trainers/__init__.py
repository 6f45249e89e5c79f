"""Train a plan's stages in your own loop, or with the trainers of Hugging Face and Lightning."""

from __future__ import annotations

from secateur.flows.trainers.recording import Recording
from secateur.flows.trainers.waiting import wait_for_shards

__all__ = ["Recording", "wait_for_shards"]

"""Room `flows.trainers`: training a plan's stages elsewhere: a loop of your own, Hugging Face's `Trainer`, Lightning's."""

from __future__ import annotations

from secateur.flows.trainers.recording import Recording
from secateur.flows.trainers.waiting import wait_for_shards

__all__ = ["Recording", "wait_for_shards"]

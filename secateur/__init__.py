"""Secateur prunes training data between the stages of a training run.

It records what each sample did to the model while it trains, scores samples by that, and writes the
ones worth keeping for the next stage.

- `Recorder`, `embed`: record your own training loop in memory, and ask what each sample did.
- `Recording`, `wait_for_shards`: record your own training loop into a run on disk or S3, and train
  the next stage on what was kept.
- `read_plan`, `curate`, `query`: run a plan, and ask its run.
- `register_layer`, `register_policy`, `register_curvature`, `register_optimizer`: plug-ins.
- `SecateurError`: the base of every error about what a user can get wrong.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from secateur.errors import SecateurError
    from secateur.flows.curate import curate
    from secateur.flows.query import query
    from secateur.flows.trainers import Recording, wait_for_shards
    from secateur.influence.embeddings import embed
    from secateur.influence.layers import register_layer
    from secateur.influence.recorder import Recorder
    from secateur.tasks.plan import register_curvature, register_optimizer, register_policy
    from secateur.tasks.plan.plan_file import read_plan

    __version__: str

__all__ = [
    "Recorder",
    "Recording",
    "SecateurError",
    "curate",
    "embed",
    "query",
    "read_plan",
    "register_curvature",
    "register_layer",
    "register_optimizer",
    "register_policy",
    "wait_for_shards",
]

# Names are imported when they are first used, because torch and Prefect take seconds to import.
_MODULES = {
    "Recorder": "secateur.influence.recorder",
    "Recording": "secateur.flows.trainers",
    "SecateurError": "secateur.errors",
    "curate": "secateur.flows.curate",
    "embed": "secateur.influence.embeddings",
    "query": "secateur.flows.query",
    "read_plan": "secateur.tasks.plan.plan_file",
    "register_curvature": "secateur.tasks.plan",
    "register_layer": "secateur.influence.layers",
    "register_optimizer": "secateur.tasks.plan",
    "register_policy": "secateur.tasks.plan",
    "wait_for_shards": "secateur.flows.trainers",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return _installed_version()
    if name not in _MODULES:
        raise AttributeError(f"module 'secateur' has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]


def _installed_version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("secateur")
    except PackageNotFoundError:  # a checkout that is on the path without being installed
        return "0+unknown"

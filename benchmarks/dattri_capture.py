"""How dattri-llm is made to store the gradients of samples, in any environment that has it."""

from __future__ import annotations

from typing import Any


def capture_gradients(model: Any, projection: Any, folder: str, callbacks: list[Any]) -> Any:
    """Return a context in which dattri-llm stores the gradient of every sample in a folder.

    Args:
        projection: how gradients are reduced; not at all if None.
        callbacks: dattri-llm's own, which follow the training.
    """
    import dattri_llm as peer  # type: ignore[import-not-found]

    store = peer.OffloadCallback(
        offload_interval=1,
        file_manager=peer.GradientStorageManager(folder),
        recording_type="per_sample",
    )
    config = peer.HookManagerConfig(linear_io=peer.REGISTER_ALL, projection_kwargs=projection)
    manager = peer.HookManager(model, config=config, callbacks=[store, *callbacks])
    return manager.collect(deregister_on_exit=True)

"""A hook before each step of an optimizer, with or without a closure."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle


def hook_before_step(
    optimizer: torch.optim.Optimizer, record: Callable[[], None]
) -> RemovableHandle:
    """Call `record` before each step of an optimizer, once the step's gradients are computed.

    For a step with a closure that is after the closure has run, because the closure computes the
    gradients. A step that changes nothing, because a `GradScaler` met an overflow, is left out.

    Args:
        optimizer: the optimizer.
        record: is called at every step.

    Returns:
        The handle that removes the hook.
    """

    def before_step(
        stepping: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        # With a fused optimizer a GradScaler calls the step all the same, and says so.
        if bool(getattr(stepping, "found_inf", None)):
            return None
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is None:
            record()
            return None

        def recorded_closure() -> Any:
            loss = closure()
            record()
            return loss

        return args[:1], {"closure": recorded_closure}

    return optimizer.register_step_pre_hook(before_step)

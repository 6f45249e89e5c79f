"""Call the factories that a plan names: the user's model and learning task."""

from __future__ import annotations

import importlib
from typing import Any, Protocol

from torch import Tensor, nn

from secateur.errors import PlanError, SecateurError
from secateur.tasks.plan import FactoryConfig


class LearningTask(Protocol):
    """How samples become tensors and losses. The plan's `task` factory makes it.

    Four methods are optional:

    - `metrics(model, batch) -> dict[str, Tensor]`: numbers per sample, reported for targets;
    - `sizes(batch) -> Tensor`: the number of output positions (tokens) that each sample's loss is
      the mean of, which `reduction: token_mean` needs, and the curvatures if it is not 1;
    - `sampled(model, batch) -> dict[str, Tensor]`: the batch with labels sampled from the model,
      which `curvature: {kind: fisher}` needs;
    - `signed_losses(model, batch) -> Tensor`: one loss per sample, in which every position's term
      has a random sign. `curvature: {kind: empirical_fisher}` needs it if there are several.
    """

    def collate(self, samples: list[dict[str, Any]]) -> dict[str, Tensor]:
        """Decode samples into tensors, batch first.

        Args:
            samples: each has `__key__`, and the bytes of its members by extension.
        """
        ...

    def losses(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """Return one loss per sample."""
        ...


def call_factory(config: FactoryConfig, role: str) -> Any:
    """Call a factory; `role` names it in errors.

    Raises:
        PlanError: it cannot be imported, does not accept the arguments, or refuses them.
    """
    module_name, name = config.factory.split(":")
    try:
        factory = getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError) as error:
        raise PlanError(
            f"the {role} factory {config.factory} cannot be imported: {error}; run from the folder "
            f"that holds it, or install it"
        ) from error
    try:
        return factory(**config.args)
    except SecateurError as error:
        raise PlanError(f"the {role} factory {config.factory} failed: {error}") from error
    except (TypeError, ValueError) as error:
        raise PlanError(
            f"the {role} factory {config.factory} does not accept its args: {error}"
        ) from error

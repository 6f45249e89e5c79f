"""The check that a captured contribution is the gradient of the sample's own loss.

That the contributions add up to the gradient received does not show whether samples were exchanged
or mixed within the model. So a few samples are run alone, and their own gradients, by autograd, are
compared with what was captured.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from secateur.errors import SecateurError
from secateur.influence.capture.gradients import parameter_gradients
from secateur.influence.capture.unchanged import random_state, unchanged_model

if TYPE_CHECKING:
    from secateur.influence.basis import Basis
    from secateur.influence.bindings import Bindings, LossesOf

RUN_ALONE = 3  # the first sample of a batch, the middle one and the last
# Relative distance allowed between a contribution and the sample's own gradient.
TOLERANCE = 1e-3
HALF_TOLERANCE = 0.1  # if anything is computed in half precision
SMALL = 1e-2  # of the largest own gradient; smaller ones are measured against this share of it


class SampleCheck:
    """Checks the contributions of a batch by running some of its samples alone.

    Args:
        bindings: the captured parameters.
        basis: the basis of the contributions.
    """

    def __init__(self, bindings: Bindings, basis: Basis) -> None:
        self._bindings = bindings
        self._basis = basis

    def check(
        self,
        contributions: Float[Tensor, "batch p"],
        weights: Float[Tensor, " batch"],
        losses_of: LossesOf,
        half: bool,
        capture: Callable[[Tensor], Float[Tensor, "batch p"]],
    ) -> None:
        """Check contributions that were captured just now.

        Args:
            contributions: of the batch.
            weights: of each sample's loss in the loss that was differentiated.
            losses_of: runs some samples of the batch.
            half: whether anything was computed in half precision.
            capture: captures the batch's contributions again, with given weights.

        Raises:
            SecateurError: a contribution is not what the sample gives alone, or a sample cannot be
                run alone.
        """
        places = _spread(len(contributions))
        tolerance = HALF_TOLERANCE if half else TOLERANCE
        with unchanged_model(self._bindings.model):
            own, is_random = self._run_alone(places, losses_of, weights)
            captured = contributions[places].to(own)
            if is_random:
                self._switch_off_dropout()
                own, is_random = self._run_alone(places, losses_of, weights)
                captured = capture(weights)[places].to(own)
            if is_random:
                warnings.warn(
                    "the losses are random in eval mode too, so it cannot be checked that the "
                    "contributions are those of the samples that they are recorded for",
                    stacklevel=2,
                )
                return
        _compare(captured, own, places, tolerance)

    def _run_alone(
        self, places: Sequence[int], losses_of: LossesOf, weights: Float[Tensor, " batch"]
    ) -> tuple[Float[Tensor, "n p"], bool]:
        """Return the gradients of samples that run alone, and whether random numbers were drawn.

        Their losses are weighted as in the batch, because without the factor of a `GradScaler`
        small gradients would vanish in float16.
        """
        named = self._bindings.parameters()
        device = next(iter(named.values())).device
        before = random_state(device)
        rows = []
        for place in places:
            try:
                loss = losses_of(torch.tensor([place])).sum() * float(weights[place])
                parameters = list(self._bindings.model.parameters())
                found = dict(zip(parameters, parameter_gradients(loss, parameters), strict=True))
            except (RuntimeError, ValueError, IndexError) as error:
                raise SecateurError(
                    f"sample {place} of the batch cannot be run alone ({error}), so its "
                    f"contribution cannot be told from the others'; samples must not depend on one "
                    f"another (BatchNorm in train mode makes them)"
                ) from error
            rows.append(self._basis.project_tensors({n: found[p] for n, p in named.items()}))
        return torch.stack(rows), not torch.equal(before, random_state(device))

    def _switch_off_dropout(self) -> None:
        """Put the model in eval mode, but BatchNorm, which mixes samples, as it was."""
        for module in self._bindings.model.modules():
            if not isinstance(module, _BatchNorm):
                module.training = False


def check_reached(bindings: Bindings, losses_of: LossesOf) -> None:
    """Check that in eval mode the losses depend on every parameter on which they do in training.

    Raises:
        SecateurError: they do not. An adapter that is merged into another weight gets no gradient.
    """
    with unchanged_model(bindings.model):
        unreached = _unreached(bindings, losses_of)
        if unreached:
            bindings.model.train()
            merged = sorted(unreached - _unreached(bindings, losses_of))
            if merged:
                raise SecateurError(
                    f"parameter {merged[0]} takes part in training and not in eval mode, in which "
                    f"targets are differentiated ({len(merged)} parameters do); if it is an "
                    f"adapter, do not let it merge in eval mode"
                )


def _unreached(bindings: Bindings, losses_of: LossesOf) -> set[str]:
    parameters = bindings.parameters()
    # Two, because BatchNorm in train mode refuses one.
    loss = losses_of(torch.zeros(2, dtype=torch.int64)).sum()
    try:
        found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    except RuntimeError:
        return set()  # reentrant checkpointing takes no part in `grad`
    return {name for name, gradient in zip(parameters, found, strict=True) if gradient is None}


def _spread(batch: int) -> list[int]:
    return sorted({0, batch // 2, batch - 1})[:RUN_ALONE]


def _compare(captured: Tensor, own: Tensor, places: Sequence[int], tolerance: float) -> None:
    """Compare contributions with weighted gradients, row by row."""
    lengths = own.norm(dim=1)
    # A sample's own length counts, or two small ones could be exchanged beside a large one. Of very
    # small ones, rounding is the larger part.
    limits = lengths.clamp(min=SMALL * float(lengths.max()))
    distances = (captured - own).norm(dim=1)
    worst = int((distances / limits.clamp(min=1e-30)).argmax())
    # A contribution that is not a number fails too, because it compares false.
    if bool((distances <= tolerance * limits + 1e-30).all()):
        return
    scale = float((captured * own).sum() / own.square().sum().clamp(min=1e-300))
    if bool(((captured - scale * own).norm(dim=1) <= tolerance * abs(scale) * limits).all()):
        raise SecateurError(
            f"the samples' weights are not those of the loss that was differentiated, which are "
            f"{scale:.4g} times as large; give `weights`, or set `batch.losses`, before the "
            f"backward pass, to the losses that it starts from"
        )
    distance = float(distances[worst] / limits[worst].clamp(min=1e-30))
    raise SecateurError(
        f"the contribution recorded for sample {places[worst]} of the batch is not the gradient "
        f"of its own loss (relative distance {distance:.2g}): "
        f"the model or the loss mixes a batch's samples or puts them in another order (BatchNorm "
        f"in train mode, a contrastive loss, a batch that is sorted); let each sample's loss "
        f"depend on that sample only"
    )

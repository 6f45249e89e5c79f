"""Layouts: along which dimension of a tensor the samples of a batch lie."""

from __future__ import annotations

import torch
from torch import Tensor

from secateur.errors import SecateurError

SHARED = -1  # the tensor does not depend on the number of samples
ORDER_TOLERANCE = 0.1  # relative distance between the same places of a sample in two batches
UNKNOWN = -2  # it depends on it in another way than by the length of one dimension


def compare_shapes(two: torch.Size, three: torch.Size) -> int:
    """Return the dimension of the samples, from a tensor's shapes with two and three samples.

    A dimension may hold several places of each sample, sample after sample (`batch * positions`).

    Returns:
        The dimension, `SHARED` or `UNKNOWN`.
    """
    if len(two) != len(three):
        return UNKNOWN
    differing = [dim for dim, (a, b) in enumerate(zip(two, three, strict=True)) if a != b]
    if not differing:
        return SHARED
    dim = differing[0]
    return dim if len(differing) == 1 and two[dim] * 3 == three[dim] * 2 else UNKNOWN


def is_in_order(two: Tensor, three: Tensor, dim: int) -> bool:
    """Check that places of two and of three samples lie sample after sample.

    The first and the last sample are the same in both. Tokens that are sorted by expert are not in
    the order of the samples, though there are as many.

    Args:
        two: a tensor of two samples.
        three: the same of three.
        dim: the dimension of the samples.
    """
    places = two.shape[dim] // 2
    for start in (0, -places):
        a, b = (x.narrow(dim, start % x.shape[dim], places).double() for x in (two, three))
        # Not exactly, because rounding depends on the number of samples.
        if (a - b).norm() > ORDER_TOLERANCE * a.norm():
            return False
    return True


def assume_layout(shape: torch.Size, samples: int) -> int:
    """Return the first dimension if it is as long as the batch, else `SHARED`."""
    return 0 if len(shape) and shape[0] == samples else SHARED


def move_samples_first(tensor: Tensor, dim: int) -> Tensor:
    """Return `batch*places ...`."""
    return tensor if dim == 0 else tensor.movedim(dim, 0)


def split_samples(tensor: Tensor, dim: int, samples: int, name: str) -> Tensor:
    """Return one slice per sample along a new first dimension.

    Args:
        tensor: of any shape.
        dim: the dimension of the samples, in which each slice keeps the sample's places.
        samples: the number of samples.
        name: of the module, for the error message.

    Raises:
        SecateurError: the dimension's length is no multiple of the number of samples.
    """
    length = tensor.shape[dim]
    if length % samples:
        raise wrong_batch(name, length, samples)
    whole: Tensor = tensor.unflatten(dim, (samples, length // samples))
    return whole.movedim(dim, 0)


def wrong_batch(name: str, length: int, samples: int) -> SecateurError:
    """Return the error of a module that sees another number of samples."""
    return SecateurError(
        f"layer {name} saw a batch of {length} where {samples} samples were announced; announce "
        f"every sample of the batch, and if the samples do not lie along the first dimension of "
        f"every layer, give `losses_of`, by which the layout is found"
    )

"""Baselines from the literature, computed from a segment's record."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from secateur.influence.optimizers import UpdateRule
from secateur.influence.segment import Segment


def gradient_norms(segment: Segment) -> Float[Tensor, " records"]:
    """Return GraNd of this one run: the norm of each sample's own loss gradient.

    The norm is taken in the coefficients of the basis. It is not a number if the sample's weight is
    zero. Source: Paul et al., "Deep Learning on a Data Diet", NeurIPS 2021, section 2.
    """
    norms: Tensor = segment.contributions.norm(dim=1).double()
    return norms / segment.weights


def tracin_scores(
    segment: Segment,
    update_rule: UpdateRule,
    before: Float[Tensor, "targets p"],
    after: Float[Tensor, "targets p"],
) -> Float[Tensor, "records targets"]:
    """Return TracIn of every record; positive if it helped.

    It is the learning rate times the product of the record's contribution with a target's gradient,
    at the nearer of the segment's two checkpoints. Source: Pruthi et al., NeurIPS 2020, section 3.

    Args:
        segment: the segment.
        update_rule: of the optimizer that made the segment. It names the recorded learning rates.
        before: gradient of each target's mean loss at the segment's start.
        after: the same at its end.
    """
    # A parameter that a step left as it was has no settings.
    rates = segment.hyper[:, :, update_rule.hyper.index("lr")][:, segment.groups].nan_to_num(0.0)
    place = segment.steps - segment.first_step
    weighted = segment.contributions.double() * rates[place]
    nearer_start = (2 * place <= segment.length)[:, None]
    return torch.where(nearer_start, weighted @ before.double().T, weighted @ after.double().T)

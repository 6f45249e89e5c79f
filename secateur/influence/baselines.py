"""Room `secateur`: baselines from the literature, read off a segment's record."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from secateur.influence.optimizers import UpdateRule
from secateur.influence.segment import Segment


def gradient_norms(segment: Segment) -> Float[Tensor, " records"]:
    """GraNd (Paul et al., "Deep Learning on a Data Diet", NeurIPS 2021, section 2), of this one run: the norm of
    each sample's own loss gradient, in the numbers of the basis; not a number where the sample weighs nothing."""
    return segment.contributions.norm(dim=1).double() / segment.weights


def tracin_scores(
    segment: Segment,
    linearised: UpdateRule,
    before: Float[Tensor, "targets p"],
    after: Float[Tensor, "targets p"],
) -> Float[Tensor, "records targets"]:
    """TracIn (Pruthi et al., NeurIPS 2020, section 3) of every use: learning rate times the product of its contribution
    with a target's gradient at the nearer of the segment's two checkpoints; positive where it helped.

    Args:
        linearised: of the optimizer that made the segment; it names the recorded learning rates.
        before, after: gradients of each target's mean loss at the segment's start and at its end.
    """
    rates = segment.hyper[:, :, linearised.hyper.index("lr")][:, segment.groups]
    place = segment.steps - segment.first_step
    weighed = segment.contributions.double() * rates[place]
    early = (2 * place <= segment.length)[:, None]
    return torch.where(early, weighed @ before.double().T, weighed @ after.double().T)

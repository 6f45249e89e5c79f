"""How similar samples are to the model: cosines of their gradients, whitened."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from secateur.influence.moments import LARGEST_SIDE, Moment, SketchedMoment

# Principal components that are compared, and what is added to their energies, relative to the
# largest. `benchmarks.groups` measures what is found with them.
COMPONENTS = 256
SHIFT = 1e-4


def whiten_directions(gradients: Float[Tensor, "n p"]) -> Float[Tensor, "n k"]:
    """Return a unit vector per gradient, whose products tell how alike two samples are.

    The gradients must be of one model. All samples of one label have similar gradients, so that
    cosines of gradients are large throughout. Here the directions that most gradients share count
    less: the components of the gradients' directions are divided by the root of their energy.

    Args:
        gradients: one per sample. The vector of a zero gradient is zero.
    """
    directions = normalize(gradients.float(), dim=1)
    centered = directions - directions.mean(0)
    width = centered.shape[1]
    moment: Moment | SketchedMoment
    if width <= LARGEST_SIDE:
        moment = Moment(width, torch.float32, centered.device)
    else:
        moment = SketchedMoment(width, torch.float32, centered.device, COMPONENTS, seed=0)
    moment.add(centered, None)
    components = centered @ moment.leading_eigenvectors(COMPONENTS).to(centered)
    energy = components.square().mean(0)
    # Without the shift, components that hold little but rounding would count like any other.
    whitened = components * (energy + SHIFT * energy.max()).clamp_min(1e-30).rsqrt()
    vectors: Tensor = normalize(whitened, dim=1) * (directions.norm(dim=1, keepdim=True) > 0)
    return vectors

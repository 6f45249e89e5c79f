"""Room `secateur`: curvature `H_t`, how a step's gradient answers a change of the parameters (DESIGN, section 1)."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from secateur.segment import Segment


@runtime_checkable
class Curvature(Protocol):
    """Multiplies by `H_t` within a span of the basis; the scale and stride of the step are already in it."""

    def product(
        self, step: int, span: slice, a: Float[Tensor, "R b"], e: Float[Tensor, "B R"]
    ) -> Float[Tensor, "R b"] | None:
        """`a @ H_t[span, span]`, or None where it is zero.

        Args:
            step: step within the stage.
            span: the numbers of the basis that `a` is about.
            a: left factor.
            e: `contributions[step] @ a.T`, which the recursion has at hand.
        """
        ...


class NoCurvature:
    """`none`: the gradient does not answer."""

    def product(self, step: int, span: slice, a: Tensor, e: Tensor) -> Tensor | None:
        return None


class EmpiricalFisher:
    """`empirical_fisher`: `sum_i c_i c_i^T / w_i`, the Gauss-Newton form of Wang et al. (2025), section 4."""

    def __init__(self, segment: Segment) -> None:
        self._segment = segment

    def product(self, step: int, span: slice, a: Tensor, e: Tensor) -> Tensor | None:
        rows = self._segment.rows(step)
        if rows.start == rows.stop:
            return None
        stride = float(self._segment.strides[step - self._segment.first_step])
        inverse = stride / self._segment.weights[rows].to(e.dtype)
        return (e * inverse[:, None]).T @ self._segment.contributions[rows, span].to(e.dtype)

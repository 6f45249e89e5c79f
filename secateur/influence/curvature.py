"""Room `secateur`: curvature `H_t`, how a step's gradient answers a change of the parameters (DESIGN, section 1)."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from secateur.errors import SecateurError
from secateur.influence.segment import Segment


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

    def __init__(self, segment: Segment, spans: Sequence[slice]) -> None:
        """Accept the arguments that every curvature is made from; none of them is read."""

    def product(self, step: int, span: slice, a: Tensor, e: Tensor) -> Tensor | None:
        return None


class EmpiricalFisher:
    """`empirical_fisher`: `sum_i c_i c_i^T / w_i`, the Gauss-Newton form of Wang et al. (2025), section 4."""

    def __init__(self, segment: Segment, spans: Sequence[slice]) -> None:
        self._segment = segment

    def product(self, step: int, span: slice, a: Tensor, e: Tensor) -> Tensor | None:
        rows = self._segment.rows(step)
        if rows.start == rows.stop:
            return None
        stride = float(self._segment.strides[step - self._segment.first_step])
        inverse = stride / self._segment.weights[rows].to(e.dtype)
        return (e * inverse[:, None]).T @ self._segment.contributions[rows, span].to(e.dtype)


class Fisher:
    """`fisher`: the same sum over contributions with labels drawn from the model itself."""

    def __init__(self, segment: Segment, spans: Sequence[slice]) -> None:
        self._segment = segment

    def product(self, step: int, span: slice, a: Tensor, e: Tensor) -> Tensor | None:
        rows = self._segment.fisher_rows(step)
        if rows.start == rows.stop:
            return None
        stride = float(self._segment.strides[step - self._segment.first_step])
        drawn = self._segment.fisher[rows, span].to(a.dtype)
        inverse = stride / self._segment.fisher_weights[rows].to(a.dtype)
        return (a @ drawn.T * inverse) @ drawn


class Hessian:
    """`hessian`: the last exact evaluation at or before the step, times the step's scale.

    Args:
        spans: what the evaluations couple: every block by itself, or all.

    Raises:
        SecateurError: nothing was evaluated at the segment's first step.
    """

    def __init__(self, segment: Segment, spans: Sequence[slice]) -> None:
        self._scales, self._first = segment.scales.tolist(), segment.first_step
        self._steps = segment.hessian_steps.tolist()
        if self._steps[:1] != [segment.first_step]:
            raise SecateurError(
                f"the segment from step {segment.first_step} on was recorded without its Hessian"
            )
        sizes = [(s.stop - s.start) for s in spans]
        parts = [row.split([size * size for size in sizes]) for row in segment.hessian]
        self._matrices = [
            {
                span.start: part.view(size, size)
                for span, size, part in zip(spans, sizes, row, strict=True)
            }
            for row in parts
        ]

    def product(self, step: int, span: slice, a: Tensor, e: Tensor) -> Tensor | None:
        matrix = self._matrices[bisect_right(self._steps, step) - 1][span.start]
        return a @ (matrix.to(a.dtype) * self._scales[step - self._first])

"""Curvature `H_t`: how a step's gradient changes when the parameters change.

Every curvature is a class that is made from a segment and the coupled spans:
`EmpiricalFisher(segment, spans)`.
"""

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
    """A product with `H_t` within a span of the basis. It includes the step's scale and stride."""

    def product(
        self, step: int, span: slice, a: Float[Tensor, "R b"], e: Float[Tensor, "B R"]
    ) -> Float[Tensor, "R b"] | None:
        """Return `a @ H_t[span, span]`, or None if it is zero.

        Args:
            step: step within the stage.
            span: the coefficients that `a` is about.
            a: left factor.
            e: `contributions[step] @ a.T`, which the recursion has already computed.
        """
        ...


class NoCurvature:
    """`none`: the gradient is taken not to change with the parameters."""

    def __init__(self, segment: Segment, spans: Sequence[slice]) -> None:
        """Accept the arguments that every curvature is made from. Neither is read."""

    def product(self, step: int, span: slice, a: Tensor, e: Tensor) -> Tensor | None:
        return None


class EmpiricalFisher:
    """`empirical_fisher`: `sum_i c_i c_i^T / w_i`.

    The Gauss-Newton form of Wang et al. (2025), section 4.
    """

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
    """`fisher`: the mean over the segment's steps of `sum_i f_i g_i g_i^T`.

    `g_i` is a sample's gradient with labels drawn from the model, or with a random sign at every
    output position, and `f_i` its weight times the number of positions that its loss is the mean
    of. Each such gradient estimates a matrix of the rank of the positions by one of rank one. The
    error would grow from step to step, so the estimates of a segment's steps are averaged; the
    curvature changes slowly.
    """

    def __init__(self, segment: Segment, spans: Sequence[slice]) -> None:
        steps = (segment.fisher_steps - segment.first_step).long()
        strides = segment.strides[steps] / max(segment.length, 1)
        self._gradients = segment.fisher
        self._inverse = (strides / segment.fisher_weights).to(segment.fisher.dtype)
        self._matrices: dict[int, Tensor] = {}

    def product(self, step: int, span: slice, a: Tensor, e: Tensor) -> Tensor | None:
        if not len(self._gradients):
            return None
        if 2 * len(self._gradients) < span.stop - span.start:
            gradients = self._gradients[:, span].to(a.dtype)
            return (a @ gradients.T * self._inverse.to(a.dtype)) @ gradients
        if span.start not in self._matrices:
            gradients = self._gradients[:, span].to(a.dtype)
            weighted = gradients * self._inverse.to(a.dtype)[:, None]
            self._matrices[span.start] = gradients.T @ weighted
        return a @ self._matrices[span.start]


class Hessian:
    """`hessian`, `gauss_newton`: the last evaluation at or before the step, times the step's scale.

    Args:
        segment: the segment.
        spans: the coefficients that the evaluations couple: one slice per block, or one slice of
            all.

    Raises:
        SecateurError: the Hessian was not evaluated at the segment's first step.
    """

    def __init__(self, segment: Segment, spans: Sequence[slice]) -> None:
        self._scales: list[float] = segment.scales.tolist()
        self._first = segment.first_step
        self._steps: list[int] = segment.hessian_steps.tolist()
        if self._steps[:1] != [segment.first_step]:
            raise SecateurError(
                f"the segment from step {segment.first_step} on was recorded without its Hessian; "
                f"record it with `curvature: {{kind: hessian}}`, `{{kind: gauss_newton}}` or "
                f"Recorder.record_hessian"
            )
        self._matrices = [_matrices_by_start(row, spans) for row in segment.hessian]

    def product(self, step: int, span: slice, a: Tensor, e: Tensor) -> Tensor | None:
        evaluation = bisect_right(self._steps, step) - 1
        matrix = self._matrices[evaluation][span.start].to(a.dtype)
        return a @ (matrix * self._scales[step - self._first])


def _matrices_by_start(
    flattened: Float[Tensor, " entries"], spans: Sequence[slice]
) -> dict[int, Float[Tensor, "_ _"]]:
    """Return each span's matrix of one evaluation, by the span's first coefficient."""
    sizes = [span.stop - span.start for span in spans]
    parts = flattened.split([size * size for size in sizes])
    return {
        span.start: part.view(size, size)
        for span, size, part in zip(spans, sizes, parts, strict=True)
    }

"""Factored captures against the matrices that they represent."""

from __future__ import annotations

import pytest
import torch

from secateur.influence.captures import Capture, DenseCapture, LookupCapture, OuterCapture

ROWS = 6
COLS = 5


def make(kind: str, positions: int) -> Capture:
    torch.manual_seed(positions)
    if kind == "outer":
        return OuterCapture(
            torch.randn(3, positions, ROWS).double(),
            torch.randn(3, positions, COLS - 1).double(),
            ones=True,
        )
    if kind == "lookup":
        return LookupCapture(
            torch.randint(ROWS, (3, positions)), torch.randn(3, positions, COLS).double(), ROWS
        )
    return DenseCapture(torch.randn(3, ROWS, COLS).double())


def explicit(capture: Capture) -> torch.Tensor:
    """Return the matrices by explicit sums of outer products."""
    if isinstance(capture, DenseCapture):
        return capture.values
    whole = torch.zeros(3, ROWS, COLS, dtype=torch.float64)
    for i in range(3):
        for s in range(capture.right.shape[1]):
            if isinstance(capture, OuterCapture):
                whole[i] += torch.outer(
                    capture.left[i, s], torch.cat([capture.right[i, s], torch.ones(1).double()])
                )
            else:
                whole[i, capture.ids[i, s]] += capture.right[i, s]
    return whole


@pytest.mark.parametrize("positions", [1, 4])
@pytest.mark.parametrize("kind", ["outer", "lookup", "dense"])
def test_all_methods_read_the_same_matrix(kind: str, positions: int) -> None:
    capture = make(kind, positions)
    whole = explicit(capture)
    p_out = torch.randn(ROWS, 2).double()
    p_in = torch.randn(COLS, 3).double()
    torch.testing.assert_close(capture.dense(), whole)
    torch.testing.assert_close(capture.project(p_out, p_in), p_out.T @ whole @ p_in)
    torch.testing.assert_close(capture.energy(), whole.square().sum(0))
    for count in (1, 25):  # few entries, and most entries
        rows = torch.randint(ROWS, (count,))
        cols = torch.randint(COLS, (count,))
        torch.testing.assert_close(capture.entries(rows, cols), whole[:, rows, cols])


def test_moments_are_sums_over_samples_and_positions() -> None:
    capture = make("outer", 4)
    assert isinstance(capture, OuterCapture)
    left, right = capture.moments()
    ones = torch.nn.functional.pad(capture.right, (0, 1), value=1.0)
    torch.testing.assert_close(left, torch.einsum("bsr,bsq->rq", capture.left, capture.left))
    torch.testing.assert_close(right, torch.einsum("bsr,bsq->rq", ones, ones))

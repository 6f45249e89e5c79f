"""The memory meter, against sizes that are known by hand."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from secateur.influence.memory_meter import MemoryMeter, measure_peak, shape_mode


def test_views_and_changes_in_place_are_no_new_memory() -> None:
    x = torch.zeros(1000)
    with MemoryMeter() as meter:
        x.view(10, 100).T.add_(1)
        assert meter.current == 0
        y = x + 1
        assert meter.current == 4000
        del y
        assert meter.current == 0
    assert meter.peak == 4000


def pass_through_a_layer() -> None:
    weight = torch.empty(300, 200, requires_grad=True)
    hidden = functional.linear(torch.empty(50, 200), weight).tanh()
    hidden.sum().backward()


def test_a_backward_pass_counts_activations_and_gradients() -> None:
    """The linear map's output is gone by then. The gradient through tanh takes as much."""
    expected = 4 * (300 * 200 + 50 * 200 + 50 * 300 + 50 * 300 + 300 * 200)
    assert measure_peak(pass_through_a_layer) == pytest.approx(expected, abs=16)


def test_shapes_alone_give_the_same_count() -> None:
    real = measure_peak(pass_through_a_layer)
    with shape_mode():
        assert measure_peak(pass_through_a_layer) == real


def test_shapes_alone_take_no_memory() -> None:
    mode = shape_mode()
    with mode:
        huge = torch.empty(1 << 40) + 1
    with mode:
        huge = huge + mode.from_tensor(torch.ones(1))
    assert huge.nbytes == 1 << 42

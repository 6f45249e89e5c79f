"""The state of a training: captured, loaded, and reset at a stage boundary."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from secateur.tasks.plan.optimizer_config import OPTIMIZERS
from secateur.tasks.training.checkpoint import capture_state, load_state

SETTINGS = [
    {"kind": "sgd", "momentum": 0.9},
    {"kind": "adamw", "amsgrad": True},
    {"kind": "nadam"},
    {"kind": "radam"},
    {"kind": "adagrad", "initial_accumulator_value": 0.5},
    {"kind": "rmsprop", "momentum": 0.9, "centered": True},
]


def build(settings: dict[str, object]) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    config = OPTIMIZERS.parse({"lr": 0.1} | settings)
    return model, config.build([{"params": list(model.parameters())}])


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_training_continues_as_if_it_had_not_stopped(settings: dict[str, object]) -> None:
    model, optimizer = build(settings)
    train(model, optimizer, range(3))
    state = capture_state(model, optimizer)
    train(model, optimizer, range(3, 6))
    other, other_optimizer = build(settings)
    load_state(state, other, other_optimizer)
    train(other, other_optimizer, range(3, 6))
    for name, tensor in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], tensor)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_a_reset_optimizer_is_a_new_one(settings: dict[str, object]) -> None:
    """Adagrad makes its state when it is built, and cannot step without it."""
    model, optimizer = build(settings)
    train(model, optimizer, range(3))
    state = capture_state(model, optimizer)
    other, other_optimizer = build(settings)
    other.load_state_dict(model.state_dict())
    train(other, other_optimizer, range(3, 6))
    load_state(state, model, optimizer, slots=False)
    train(model, optimizer, range(3, 6))
    for name, tensor in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], tensor)

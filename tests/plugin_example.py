"""A user's plug-in: one policy, one curvature, one optimizer and one layer, in one file.

tests/test_plugins.py copies it into a user's folder and names it in a plan.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import polars as pl
import torch
from torch import Tensor, nn

import secateur
from secateur.influence.blocks import Piece, make_piece
from secateur.influence.captures import DenseCapture
from secateur.influence.curvature import Curvature
from secateur.influence.layers import LayerFamily
from secateur.influence.optimizers import Hyperparameters, UpdateRule, register_update_rule
from secateur.influence.segment import Segment
from secateur.tasks.plan import CurvatureConfig, Fraction, OptimizerConfig, Policy
from secateur.tasks.pruning.context import PruningContext
from secateur.tasks.pruning.ranking import keep_best, rank_samples


@secateur.register_policy
class KeepSurprising(Policy):
    """Keeps the samples whose loss is highest."""

    policy: Literal["surprising"] = "surprising"
    keep: Fraction

    def decide(self, samples: pl.DataFrame, context: PruningContext) -> pl.DataFrame:
        ranked = rank_samples(samples, pl.col("loss"), descending=True)
        return keep_best(ranked, self.keep, "loss", self.policy)


class Damping:
    """A curvature that is a multiple of the identity."""

    def __init__(self, damping: float) -> None:
        self.damping = damping

    def product(self, step: int, span: slice, a: Tensor, e: Tensor) -> Tensor:
        return self.damping * a


@secateur.register_curvature
class DampingConfig(CurvatureConfig):
    """The gradient changes by a fixed multiple of the parameters' change."""

    kind: Literal["damping"] = "damping"
    damping: float = 0.1

    def build(self, segment: Segment, spans: Sequence[slice]) -> Curvature:
        return Damping(self.damping)


class SoftSign(torch.optim.Optimizer):
    """Moves each parameter by the learning rate times tanh of its gradient."""

    def __init__(self, params: object, lr: float, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})  # type: ignore[arg-type]

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                gradient = parameter.grad + group["weight_decay"] * parameter
                parameter -= group["lr"] * gradient.tanh()


@register_update_rule(SoftSign)
class SoftSignUpdate(UpdateRule):
    """The same update, differentiable."""

    hyper = ("lr", "weight_decay")
    slots = ()

    def update(self, state: Tensor, grad: Tensor, h: Hyperparameters) -> Tensor:
        gradient = grad + h["weight_decay"] * state[0]
        return torch.stack([state[0] - h["lr"] * gradient.tanh()])


@secateur.register_optimizer
class SoftSignConfig(OptimizerConfig):
    """tanh of the gradient."""

    kind: Literal["soft_sign"] = "soft_sign"
    optimizer_class = SoftSign


class Scale(nn.Module):
    """Multiplies each feature by a weight."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


@secateur.register_layer(Scale)
class ScaleFamily(LayerFamily):
    """The weight is a block of one column."""

    def pieces(self, module: nn.Module) -> tuple[int, tuple[Piece, ...]]:
        assert isinstance(module, Scale)
        rows = len(module.weight)
        return rows, (make_piece("weight", module.weight, rows),)

    def capture(
        self, module: nn.Module, inputs: tuple[Tensor, ...], gradient: Tensor
    ) -> DenseCapture:
        return DenseCapture((gradient * inputs[0])[:, :, None])


def network() -> nn.Module:
    """64-12-10 with a scale between."""
    return nn.Sequential(nn.Linear(64, 12), nn.Tanh(), Scale(12), nn.Linear(12, 10))

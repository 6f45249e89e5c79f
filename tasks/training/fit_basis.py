"""Fit the run's basis on its first steps, which are then run again for real."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

from secateur.influence.basis import Basis
from secateur.influence.basis_fitting import EnergyFit, MomentFit
from secateur.influence.bindings import Bindings
from secateur.influence.hooks import capture_hooks
from secateur.influence.random_basis import random_kronecker_basis
from secateur.storage.attempt import Attempt
from secateur.storage.tensors import write_tensors
from secateur.tasks.data.samples import read_stage_samples
from secateur.tasks.engine.progress import track
from secateur.tasks.plan import KroneckerBasisConfig
from secateur.tasks.run import Run
from secateur.tasks.training.loop import MicroBatch, TrainingLoop


def fit_basis(run: Run, weights: dict[str, Tensor] | None = None) -> int:
    """Fit the basis and store it. The model that it was fitted with is discarded.

    Args:
        weights: initial weights; those of the plan's model if None.

    Returns:
        Number of coefficients that a contribution is reduced to, p.
    """

    def write(attempt: Attempt) -> None:
        basis = _fit(run, weights)
        metadata: dict[str, str] = {"kind": run.plan.basis_config.kind}
        write_tensors(attempt, "basis.safetensors", basis.tensors(), metadata)
        attempt.facts["numbers"] = basis.size
        attempt.facts["blocks"] = {
            block.name: span.stop - span.start
            for block, span in zip(basis.blocks, basis.spans, strict=True)
        }

    return int(run.folder.basis.write_once("basis", {}, write).facts["numbers"])


def _fit(run: Run, weights: dict[str, Tensor] | None) -> Basis:
    config = run.plan.basis_config
    dtype = getattr(torch, run.plan.number_type)
    loop = TrainingLoop(run, 0, read_stage_samples(run, 0))
    if weights is not None:
        loop.model.load_state_dict(weights)
    bindings = run.bindings(loop.model)
    if not isinstance(config, KroneckerBasisConfig):
        energy = EnergyFit(bindings)
        _train_first_steps(loop, bindings, energy, config.fit_steps)
        return energy.basis(config.numbers)
    if config.method == "random":
        return random_kronecker_basis(bindings, config.rank, run.plan.seed, dtype)
    moments = MomentFit(bindings, config.rank)
    _train_first_steps(loop, bindings, moments, config.fit_steps)
    return moments.basis(dtype)


def _train_first_steps(
    loop: TrainingLoop, bindings: Bindings, fit: MomentFit | EnergyFit, steps: int
) -> None:
    steps = min(steps, loop.schedule.steps)
    for step in track(range(steps), "fitting the basis", steps):
        loop.step(step, partial(_capture, loop, bindings, fit))


@contextmanager
def _capture(
    loop: TrainingLoop, bindings: Bindings, fit: MomentFit | EnergyFit, part: MicroBatch
) -> Iterator[None]:
    bindings.locate(loop.losses_of(part.tensors), len(part.rows))
    with capture_hooks(bindings, fit.add, len(part.rows), documents=part.documents):
        yield

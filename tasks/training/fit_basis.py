"""Room `tasks`: fitting the run's basis on its first steps, which are run again for real afterwards."""

from __future__ import annotations

import torch
from torch import Tensor

from secateur.influence.basis import Basis
from secateur.influence.basis_fitting import EnergyFit, MomentFit, random_kronecker_basis
from secateur.influence.bindings import Bindings
from secateur.influence.hooks import capture_hooks
from secateur.storage.tensors import write_tensors
from secateur.tasks.data.samples import read_stage_samples
from secateur.tasks.engine.prefect_task import pipeline_task
from secateur.tasks.engine.progress import track
from secateur.tasks.plan import KroneckerBasisConfig
from secateur.tasks.run.run import Run
from secateur.tasks.training.loop import TrainingLoop


@pipeline_task("fit basis", makes=lambda run: run.folder.basis, draws=True)
def fit_basis(run_url: str) -> int:
    """Fits the basis and stores it; the model it was fitted with is thrown away.

    Returns:
        Numbers a contribution is reduced to, p.
    """
    return store_basis(Run.open(run_url))


def store_basis(run: Run, weights: dict[str, Tensor] | None = None) -> int:
    """The same, beginning with other weights than the plan's model is made with."""
    artefact = run.folder.basis
    if not artefact.committed:
        basis = _fit(run, weights)
        with artefact.attempt("basis", {}) as attempt:
            write_tensors(
                attempt, "basis.safetensors", basis.tensors(), {"kind": run.plan.numbers.kind}
            )
            attempt.facts["numbers"] = basis.size
            attempt.facts["blocks"] = {
                b.name: s.stop - s.start for b, s in zip(basis.blocks, basis.spans, strict=True)
            }
    return int(artefact.manifest.facts["numbers"])


def _fit(run: Run, weights: dict[str, Tensor] | None) -> Basis:
    spec, dtype = run.plan.numbers, getattr(torch, run.plan.dtype)
    loop = TrainingLoop(run, 0, read_stage_samples(run, 0))
    if weights is not None:
        loop.model.load_state_dict(weights)
    bindings = run.bindings(loop.model)
    if isinstance(spec, KroneckerBasisConfig):
        if spec.method == "random":
            return random_kronecker_basis(bindings, spec.rank, run.plan.seed, dtype)
        moments = MomentFit(bindings)
        _first_steps(loop, bindings, moments, spec.fit_steps)
        return moments.basis(spec.rank, dtype)
    energy = EnergyFit(bindings)
    _first_steps(loop, bindings, energy, spec.fit_steps)
    return energy.basis(spec.numbers)


def _first_steps(
    loop: TrainingLoop, bindings: Bindings, fit: MomentFit | EnergyFit, steps: int
) -> None:
    """Trains the first steps of the run with the layers tapped."""
    steps = min(steps, loop.order.steps)
    for step in track(range(steps), "fitting the basis", steps):
        with capture_hooks(bindings, fit.add):
            loop.step(step)

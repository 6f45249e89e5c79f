"""Room `tasks`: fitting the run's basis on its first steps, which are run again for real afterwards."""

from __future__ import annotations

import torch
from torch import Tensor

from secateur.basis import Basis
from secateur.bindings import Bindings
from secateur.fitting import EnergyFit, MomentFit, random_kronecker
from secateur.tap import tap
from storage.tensors import write_tensors
from tasks.behaviour import task
from tasks.loop import Loop
from tasks.plan import Kronecker
from tasks.progress import track
from tasks.run import Run
from tasks.samples import stage_samples


@task("fit basis", makes=lambda run: run.folder.basis, draws=True)
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
            write_tensors(attempt, "basis.safetensors", basis.tensors(), {"kind": run.plan.numbers.kind})
            attempt.facts["numbers"] = basis.size
            attempt.facts["blocks"] = {b.name: s.stop - s.start for b, s in zip(basis.blocks, basis.spans, strict=True)}
    return int(artefact.manifest.facts["numbers"])


def _fit(run: Run, weights: dict[str, Tensor] | None) -> Basis:
    spec, dtype = run.plan.numbers, getattr(torch, run.plan.dtype)
    loop = Loop(run, 0, stage_samples(run, 0))
    if weights is not None:
        loop.model.load_state_dict(weights)
    bindings = run.bindings(loop.model)
    if isinstance(spec, Kronecker):
        if spec.method == "random":
            return random_kronecker(bindings, spec.rank, run.plan.seed, dtype)
        moments = MomentFit(bindings)
        _first_steps(loop, bindings, moments, spec.fit_steps)
        return moments.basis(spec.rank, dtype)
    energy = EnergyFit(bindings)
    _first_steps(loop, bindings, energy, spec.fit_steps)
    return energy.basis(spec.numbers)


def _first_steps(loop: Loop, bindings: Bindings, fit: MomentFit | EnergyFit, steps: int) -> None:
    """Trains the first steps of the run with the layers tapped."""
    steps = min(steps, loop.order.steps)
    for step in track(range(steps), "fitting the basis", steps):
        with tap(bindings, fit.add):
            loop.step(step)

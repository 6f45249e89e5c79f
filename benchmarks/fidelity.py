"""Spearman correlation of scores with retraining.

`python -m benchmarks.fidelity [--workload A B] [--estimator NAME ...] [--seeds 5] [--json]`
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from scipy.stats import pearsonr, spearmanr
from torch import Tensor, nn

from benchmarks.larger import make_images, make_text
from benchmarks.peers import ADAMW_ONLY, PEERS
from benchmarks.record import replay_loss
from benchmarks.workloads import Trained, Workload, make_digits
from secateur.influence.basis import Basis
from secateur.influence.basis_fitting import EnergyFit, MomentFit
from secateur.influence.bindings import bind_layers
from secateur.influence.curvature import Curvature, EmpiricalFisher, Hessian
from secateur.influence.gauss_newton import compute_gauss_newton
from secateur.influence.hessian import compute_hessian
from secateur.influence.hooks import capture_hooks, sample_gradients
from secateur.influence.kronecker_basis import KroneckerBasis
from secateur.influence.principal_directions import principal_directions
from secateur.influence.random_basis import random_kronecker_basis
from secateur.influence.recorder import Recorder
from secateur.influence.recursion import Dynamics, walk_segment
from secateur.influence.tape import Tape
from secateur.influence.vector_products import ComputeMatrices

# As in a plan that does not say otherwise.
KRONECKER_FIT_STEPS, COORDINATES_FIT_STEPS = 10, 50
PEER_NUMBERS = 416  # coefficients of the peers that do not use full gradients


@dataclass
class Row:
    """One estimator on one workload and seed. `cost` is its time over that of plain training."""

    workload: str
    estimator: str
    numbers: int
    seed: int
    spearman: float
    pearson: float
    cost: float


@dataclass(frozen=True)
class EmbeddingSettings:
    """Settings of the embeddings.

    Attributes:
        basis: fits the basis, given a workload and a seed.
        coupling: `block` or `full`.
        every: steps that one evaluated matrix is used for; 0 means empirical Fisher.
        components: principal directions that embeddings are reduced to; 0 means none.
        compute: evaluates the matrix.
    """

    basis: Callable[[Workload, int], Basis]
    coupling: str
    every: int = 0
    components: int = 0
    compute: ComputeMatrices = compute_hessian


def fit_pca_basis(workload: Workload, seed: int) -> Basis:
    """Fit a PCA Kronecker basis of 16 x 16 per layer."""
    fit = MomentFit(bind_layers(workload.model()), 16)
    _train_first_steps(workload, fit, KRONECKER_FIT_STEPS)
    return fit.basis(torch.float64)


def make_random_basis(workload: Workload, seed: int) -> Basis:
    """Draw a random Kronecker basis of 16 x 16 per layer."""
    return random_kronecker_basis(bind_layers(workload.model()), 16, seed, torch.float64)


def fit_416_coordinates(workload: Workload, seed: int) -> Basis:
    """Choose the 416 coordinates of most energy."""
    return _fit_coordinates(workload, 416)


def fit_2048_coordinates(workload: Workload, seed: int) -> Basis:
    """Choose the 2,048 coordinates of most energy."""
    return _fit_coordinates(workload, 2048)


def take_all_coordinates(workload: Workload, seed: int) -> Basis:
    """Choose every parameter."""
    return _fit_coordinates(workload, None)


def _fit_coordinates(workload: Workload, count: int | None) -> Basis:
    fit = EnergyFit(bind_layers(workload.model()))
    _train_first_steps(workload, fit, COORDINATES_FIT_STEPS)
    return fit.basis(count)


def _train_first_steps(workload: Workload, fit: MomentFit | EnergyFit, steps: int) -> None:
    model = workload.model()
    optimizer = workload.optimizer(model)
    bindings = bind_layers(model)
    for step in range(steps):
        with capture_hooks(bindings, fit.add, len(workload.batches[step])):
            workload.step(model, optimizer, step)


ESTIMATORS: dict[str, EmbeddingSettings | None] = {
    "replay": None,
    "random empirical_fisher block": EmbeddingSettings(make_random_basis, "block"),
    "pca empirical_fisher block": EmbeddingSettings(fit_pca_basis, "block"),
    "pca empirical_fisher full": EmbeddingSettings(fit_pca_basis, "full"),
    "pca hessian/20 full": EmbeddingSettings(fit_pca_basis, "full", 20),
    "pca hessian/1 block": EmbeddingSettings(fit_pca_basis, "block", 1),
    "pca hessian/1 full": EmbeddingSettings(fit_pca_basis, "full", 1),
    "pca gauss_newton/1 full": EmbeddingSettings(
        fit_pca_basis, "full", 1, compute=compute_gauss_newton
    ),
    "coordinates gauss_newton/1 full": EmbeddingSettings(
        fit_416_coordinates, "full", 1, compute=compute_gauss_newton
    ),
    "coordinates empirical_fisher full": EmbeddingSettings(fit_416_coordinates, "full"),
    "coordinates hessian/5 full": EmbeddingSettings(fit_416_coordinates, "full", 5),
    "coordinates hessian/1 full": EmbeddingSettings(fit_416_coordinates, "full", 1),
    "2048 coordinates empirical_fisher block": EmbeddingSettings(fit_2048_coordinates, "block"),
    "2048 coordinates empirical_fisher full": EmbeddingSettings(fit_2048_coordinates, "full"),
    "all in 416 components, empirical_fisher full": EmbeddingSettings(
        take_all_coordinates, "full", 0, 416
    ),
    "all in 2048 components, empirical_fisher full": EmbeddingSettings(
        take_all_coordinates, "full", 0, 2048
    ),
    "all in 416 components, hessian/2 full": EmbeddingSettings(
        take_all_coordinates, "full", 2, 416
    ),
    "all empirical_fisher full": EmbeddingSettings(take_all_coordinates, "full"),
    "all hessian/1 full": EmbeddingSettings(take_all_coordinates, "full", 1),
}


def embedding_scores(workload: Workload, basis: Basis, settings: EmbeddingSettings) -> Tensor:
    """Return the score of every removal by its embedding, from one recorded training."""
    spans = list(basis.spans) if settings.coupling == "block" else [slice(0, basis.size)]
    trained = _train_recorded(workload, basis, settings, spans)
    assert trained.recorder is not None
    segment = trained.recorder.take_segment()
    curvature: Curvature = EmpiricalFisher(segment, spans)
    if settings.every:
        curvature = Hessian(segment, spans)
    dynamics = Dynamics.from_segment(segment, trained.recorder.update_rule, curvature, spans)
    gradient = _target_gradient(workload, trained, basis)
    slots = len(trained.recorder.update_rule.slots) + 1
    if settings.components:
        directions = principal_directions(segment.contributions.clone(), settings.components)
        gradient = directions @ (directions.T @ gradient)
    # Walking the target's gradient alone costs less than the embeddings, and gives the same.
    query = []
    for span in spans:
        start = torch.zeros(1, slots, span.stop - span.start, dtype=segment.contributions.dtype)
        start[0, 0] = gradient[span]
        query.append(start)
    effects, _ = walk_segment(dynamics, query)
    return torch.cat(effects, 1).sum(1)[_removed_uses(workload)]


def _train_recorded(
    workload: Workload, basis: Basis, settings: EmbeddingSettings, spans: list[slice]
) -> Trained:
    """Train once, and record every step and the evaluated matrices."""

    def record_matrix(step: int, model: nn.Module, recorder: Recorder) -> None:
        if step % settings.every == 0:
            ids = torch.cat(workload.batches[step : step + settings.every])
            losses = [lambda: workload.losses(model, ids).mean()]
            recorder.record_hessian(settings.compute(losses, model, basis, spans))

    return workload.train(
        lambda model, optimizer: Recorder(model, optimizer, bind_layers(model), basis),
        record_matrix if settings.every else None,
    )


def _target_gradient(workload: Workload, trained: Trained, basis: Basis) -> Tensor:
    """The target's mean gradient at the end, in the basis."""
    model = trained.model
    ids = workload.validation
    gradients, _ = sample_gradients(
        lambda rows: workload.losses(model, ids[rows]), len(ids), bind_layers(model), basis
    )
    return gradients.mean(0)


def replay_scores(workload: Workload) -> Tensor:
    """Return the score of every removal by the adjoint of training."""
    model = workload.model()
    optimizer = workload.optimizer(model)
    tape = Tape(model, optimizer)
    for step in range(len(workload.batches)):
        workload.step(model, optimizer, step)
    tape.close()
    steps = [tape.steps.pop() for _ in workload.batches]
    effects = replay_loss(workload, model, tape, steps, workload.target_losses(model).mean())
    return effects[_removed_uses(workload)]


def _removed_uses(workload: Workload) -> Tensor:
    """The place of every removal among all uses."""
    size = len(workload.batches[0])
    return torch.tensor([step * size + place for step, place in workload.removals])


def time_plain_training(workload: Workload) -> float:
    """Return the seconds of training with nothing recorded or kept, the lesser of two runs."""
    seconds = []
    for _ in range(2):
        model = workload.model()
        optimizer = workload.optimizer(model)
        start = time.perf_counter()
        for step in range(len(workload.batches)):
            workload.step(model, optimizer, step)
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def measure(name: str, seed: int, estimators: list[str]) -> list[Row]:
    """Compare estimators with the same retrainings, on one workload and seed."""
    workload = make_workload(name, seed)
    training_seconds = time_plain_training(workload)
    trained = workload.train()
    effects = workload.retraining_effects(trained)
    parameters = sum(parameter.numel() for parameter in trained.model.parameters())
    rows = []
    for estimator in estimators:
        if estimator in ADAMW_ONLY and name[0] in "AB":
            continue
        print(f"{name} seed {seed}: {estimator}", file=sys.stderr)
        start = time.perf_counter()
        estimated = estimate(workload, estimator, seed, parameters)
        if estimated is None:
            continue
        scores, numbers = estimated
        cost = (time.perf_counter() - start) / training_seconds
        spearman = float(spearmanr(scores, effects).statistic)
        pearson = float(pearsonr(scores, effects).statistic)
        rows.append(Row(name, estimator, numbers, seed, spearman, pearson, cost))
    return rows


def make_workload(name: str, seed: int) -> Workload:
    """Return a workload by its name."""
    if name in "EF":
        return {"E": make_images, "F": make_text}[name](seed)
    return make_digits(name, seed)


def estimate(
    workload: Workload, estimator: str, seed: int, parameters: int
) -> tuple[Tensor, int] | None:
    """Return the score of every removal, and how many numbers a contribution is reduced to.

    Returns:
        None if the estimator cannot follow the workload's optimizer.
    """
    if estimator in PEERS:
        numbers = parameters if "full" in estimator else PEER_NUMBERS
        return PEERS[estimator](workload), numbers
    settings = ESTIMATORS[estimator]
    if settings is None:
        return replay_scores(workload), parameters
    basis = settings.basis(workload, seed)
    # A kronecker basis cannot follow AdamW.
    if isinstance(basis, KroneckerBasis) and workload.name[0] in "CDEF":
        return None
    return embedding_scores(workload, basis, settings), settings.components or basis.size


def main() -> None:
    """Print a table, or one JSON list."""
    parser = argparse.ArgumentParser(description=__doc__)
    workloads = [*"ABCDEF", *(f"{name}-relu" for name in "ABCD")]
    known = [*ESTIMATORS, *PEERS]
    parser.add_argument("--workload", nargs="+", default=list("ABCD"), choices=workloads)
    parser.add_argument("--estimator", nargs="+", default=list(ESTIMATORS), choices=known)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = [
        row
        for name in options.workload
        for seed in range(options.seeds)
        for row in measure(name, seed, options.estimator)
    ]
    if options.json:
        print(json.dumps([asdict(row) for row in rows], indent=1))
    else:
        print_table(rows, options.workload, options.estimator)


def print_table(rows: list[Row], workloads: list[str], estimators: list[str]) -> None:
    """Print a line per workload and estimator: the median, least and greatest correlation."""
    spearman = "spearman: median (min to max)"
    print(f"{'workload':9}{'estimator':46}{'numbers':>8}  {spearman:32}{'cost':>6}")
    for name in workloads:
        for estimator in estimators:
            own = [row for row in rows if (row.workload, row.estimator) == (name, estimator)]
            if not own:
                continue
            values = sorted(row.spearman for row in own)
            spread = f"{statistics.median(values):.3f} ({values[0]:.3f} to {values[-1]:.3f})"
            cost = statistics.median(row.cost for row in own)
            print(f"{name:9}{estimator:46}{own[0].numbers:8}  {spread:32}{cost:6.2f}")


if __name__ == "__main__":
    main()

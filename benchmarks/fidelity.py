"""Spearman correlation of scores with retraining: `python -m benchmarks.fidelity [--workload A B] [--seeds 5] [--json]`."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from scipy.stats import pearsonr, spearmanr
from torch import Tensor

from benchmarks.workloads import Trained, Workload, digits
from secateur.basis import Basis, Kronecker
from secateur.bindings import bind
from secateur.curvature import EmpiricalFisher
from secateur.fitting import EnergyFit, MomentFit, random_kronecker
from secateur.optimizers import linearise
from secateur.recorder import Recorder
from secateur.recursion import Dynamics, walk
from secateur.tap import contributions, tap

FIT_STEPS = 10


@dataclass
class Row:
    """One estimator on one workload and seed; `cost` is its time over the plain training time."""

    workload: str
    estimator: str
    numbers: int
    seed: int
    spearman: float
    pearson: float
    cost: float


def pca(workload: Workload, seed: int) -> Basis:
    """A PCA Kronecker basis of 16 x 16 a layer."""
    return _fitted(workload, lambda bindings: MomentFit(bindings), lambda fit: fit.basis(16, torch.float64))


def random(workload: Workload, seed: int) -> Basis:
    """A random Kronecker basis of 16 x 16 a layer."""
    return random_kronecker(bind(workload.model()), 16, seed, torch.float64)


def full(workload: Workload, seed: int) -> Basis:
    """Every parameter."""
    return _fitted(workload, lambda bindings: EnergyFit(bindings), lambda fit: fit.basis(None))


def _fitted(workload: Workload, make: Callable, finish: Callable) -> Basis:
    model = workload.model()
    optimizer, bindings = workload.optimizer(model), bind(model)
    fit = make(bindings)
    for step in range(FIT_STEPS):
        with tap(bindings, fit.add):
            workload.step(model, optimizer, step)
    return finish(fit)


ESTIMATORS: dict[str, tuple[Callable[[Workload, int], Basis], str]] = {
    "random-kronecker empirical_fisher block": (random, "block"),
    "pca-kronecker empirical_fisher block": (pca, "block"),
    "pca-kronecker empirical_fisher full": (pca, "full"),
    "all-coordinates empirical_fisher full": (full, "full"),
}


def embedding_scores(workload: Workload, basis: Basis, coupling: str) -> tuple[Trained, Tensor]:
    """A recorded run, and the score of every removal by its embedding, from one walk of the target's gradient."""
    trained = workload.train(lambda model, optimizer: Recorder(model, optimizer, bind(model), basis))
    assert trained.recorder is not None
    segment = trained.recorder.take()
    spans = basis.spans if coupling == "block" else [slice(0, basis.size)]
    optimizer = linearise(trained.optimizer)
    dynamics = Dynamics.of(segment, optimizer, EmpiricalFisher(segment), spans)
    count = len(workload.target_losses(trained.model))
    rows, _ = contributions(lambda: workload.target_losses(trained.model), count, bind(trained.model), basis)
    gradient = rows.mean(0)
    slots = len(optimizer.slots) + 1
    query = []
    for span in spans:
        start = torch.zeros(1, slots, span.stop - span.start, dtype=torch.float64)
        start[0, 0] = gradient[span]
        query.append(start)
    effects, _ = walk(dynamics, query)
    scores = torch.cat(effects, 1).sum(1)
    size = len(workload.batches[0])
    return trained, scores[torch.tensor([step * size + place for step, place in workload.removals])]


def measure(name: str, seed: int, chosen: list[str]) -> list[Row]:
    """All estimators on one workload and seed, held against the same retrainings."""
    workload = digits(name, seed)
    started = time.perf_counter()
    plain = workload.train()
    training = time.perf_counter() - started
    truth = workload.truth(plain)
    rows = []
    for estimator in chosen:
        make, coupling = ESTIMATORS[estimator]
        basis = make(workload, seed)
        if isinstance(basis, Kronecker) and name in "CD":
            continue  # a kronecker basis cannot follow AdamW
        started = time.perf_counter()
        _, scores = embedding_scores(workload, basis, coupling)
        cost = (time.perf_counter() - started) / training
        rho, r = spearmanr(scores, truth).statistic, pearsonr(scores, truth).statistic
        rows.append(Row(name, estimator, basis.size, seed, float(rho), float(r), cost))
    return rows


def main() -> None:
    """Prints a table, or one JSON list."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workload", nargs="+", default=["A", "B"], choices=["A", "B"])
    parser.add_argument("--estimator", nargs="+", default=list(ESTIMATORS), choices=list(ESTIMATORS))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = [
        row
        for name in arguments.workload
        for seed in range(arguments.seeds)
        for row in measure(name, seed, arguments.estimator)
    ]
    if arguments.json:
        print(json.dumps([asdict(row) for row in rows], indent=1))
        return
    print(f"{'workload':9}{'estimator':42}{'numbers':>8}  {'spearman: median (min to max)':32}{'cost':>6}")
    for name in arguments.workload:
        for estimator in arguments.estimator:
            own = [row for row in rows if (row.workload, row.estimator) == (name, estimator)]
            if own:
                found = sorted(row.spearman for row in own)
                spread = f"{statistics.median(found):.3f} ({found[0]:.3f} to {found[-1]:.3f})"
                cost = statistics.median(row.cost for row in own)
                print(f"{name:9}{estimator:42}{own[0].numbers:8}  {spread:32}{cost:6.2f}")


if __name__ == "__main__":
    main()

"""Spearman correlation of scores with retraining: `python -m benchmarks.fidelity [--workload A B] [--seeds 5] [--json]`."""

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

from benchmarks.larger import images, text
from benchmarks.peers import ADAMW_ONLY, PEERS
from benchmarks.workloads import Workload, digits
from secateur.influence.adjoint import LossPart, Tape, step_back
from secateur.influence.basis import Basis, KroneckerBasis, leading_eigenvectors
from secateur.influence.basis_fitting import EnergyFit, MomentFit, random_kronecker_basis
from secateur.influence.bindings import bind_layers
from secateur.influence.curvature import EmpiricalFisher, Hessian
from secateur.influence.hessian import compute_hessian
from secateur.influence.hooks import capture_hooks, sample_gradients
from secateur.influence.recorder import Recorder
from secateur.influence.recursion import Dynamics, identity_transition, walk_segment

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


@dataclass(frozen=True)
class Embeddings:
    """A setting of the embeddings: basis, coupling, the steps that one Hessian stands for (0: empirical Fisher), and the
    principal components that embeddings are reduced to (0: none)."""

    basis: Callable[[Workload, int], Basis]
    coupling: str
    every: int = 0
    components: int = 0


def pca(workload: Workload, seed: int) -> Basis:
    """A PCA Kronecker basis of 16 x 16 a layer."""
    return _fitted(
        workload, lambda bindings: MomentFit(bindings), lambda fit: fit.basis(16, torch.float64)
    )


def random(workload: Workload, seed: int) -> Basis:
    """A random Kronecker basis of 16 x 16 a layer."""
    return random_kronecker_basis(bind_layers(workload.model()), 16, seed, torch.float64)


def few(workload: Workload, seed: int) -> Basis:
    """The 416 coordinates of most energy."""
    return _fitted(workload, lambda bindings: EnergyFit(bindings), lambda fit: fit.basis(416))


def two_thousand(workload: Workload, seed: int) -> Basis:
    """The 2,048 coordinates of most energy."""
    return _fitted(workload, lambda bindings: EnergyFit(bindings), lambda fit: fit.basis(2048))


def full(workload: Workload, seed: int) -> Basis:
    """Every parameter."""
    return _fitted(workload, lambda bindings: EnergyFit(bindings), lambda fit: fit.basis(None))


def _fitted(workload: Workload, make: Callable, finish: Callable) -> Basis:
    model = workload.model()
    optimizer, bindings = workload.optimizer(model), bind_layers(model)
    fit = make(bindings)
    for step in range(FIT_STEPS):
        with capture_hooks(bindings, fit.add):
            workload.step(model, optimizer, step)
    return finish(fit)


ESTIMATORS: dict[str, Embeddings | None] = {
    "replay": None,
    "random empirical_fisher block": Embeddings(random, "block"),
    "pca empirical_fisher block": Embeddings(pca, "block"),
    "pca empirical_fisher full": Embeddings(pca, "full"),
    "pca hessian/20 full": Embeddings(pca, "full", 20),
    "pca hessian/1 block": Embeddings(pca, "block", 1),
    "pca hessian/1 full": Embeddings(pca, "full", 1),
    "coordinates empirical_fisher full": Embeddings(few, "full"),
    "coordinates hessian/5 full": Embeddings(few, "full", 5),
    "coordinates hessian/1 full": Embeddings(few, "full", 1),
    "2048 coordinates empirical_fisher block": Embeddings(two_thousand, "block"),
    "2048 coordinates empirical_fisher full": Embeddings(two_thousand, "full"),
    "all in 2048 components, empirical_fisher full": Embeddings(full, "full", 0, 2048),
    "all in 416 components, hessian/2 full": Embeddings(full, "full", 2, 416),
    "all empirical_fisher full": Embeddings(full, "full"),
    "all hessian/1 full": Embeddings(full, "full", 1),
}


def embedding_scores(workload: Workload, basis: Basis, setting: Embeddings) -> Tensor:
    """The score of every removal by its embedding, from a recorded run and one walk of the target's gradient."""
    spans = list(basis.spans) if setting.coupling == "block" else [slice(0, basis.size)]

    def evaluate(step: int, model: nn.Module, recorder: Recorder) -> None:
        if step % setting.every == 0:
            ids = torch.cat(workload.batches[step : step + setting.every])
            recorder.record_hessian(
                compute_hessian([lambda: workload.losses(model, ids).mean()], model, basis, spans)
            )

    trained = workload.train(
        lambda model, optimizer: Recorder(model, optimizer, bind_layers(model), basis),
        evaluate if setting.every else None,
    )
    assert trained.recorder is not None
    segment = trained.recorder.take_segment()
    curvature = Hessian(segment, spans) if setting.every else EmpiricalFisher(segment, spans)
    dynamics = Dynamics.from_segment(segment, trained.recorder.update_rule, curvature, spans)
    count = len(workload.target_losses(trained.model))
    rows, _ = sample_gradients(
        lambda: workload.target_losses(trained.model), count, bind_layers(trained.model), basis
    )
    slots, size = len(trained.recorder.update_rule.slots) + 1, len(workload.batches[0])
    removed = torch.tensor([step * size + place for step, place in workload.removals])
    if setting.components:
        (embeddings,), _ = walk_segment(
            dynamics, identity_transition(spans, slots, torch.float64, theta_only=True)
        )
        axes = leading_eigenvectors(embeddings.T @ embeddings, setting.components)
        return embeddings[removed] @ axes @ (axes.T @ rows.mean(0))
    query = []
    for span in spans:
        start = torch.zeros(1, slots, span.stop - span.start, dtype=segment.contributions.dtype)
        start[0, 0] = rows.mean(0)[span]
        query.append(start)
    effects, _ = walk_segment(dynamics, query)
    return torch.cat(effects, 1).sum(1)[removed]


def replay_scores(workload: Workload) -> Tensor:
    """The score of every removal by the adjoint of training."""
    model = workload.model()
    optimizer = workload.optimizer(model)
    tape = Tape(model, optimizer)
    for step in range(len(workload.batches)):
        workload.step(model, optimizer, step)
    tape.close()
    named = dict(model.named_parameters())
    gradients = torch.autograd.grad(workload.target_losses(model).mean(), list(named.values()))
    later = tape.groups.start_adjoint(
        dict(zip(named, gradients, strict=True)), len(tape.update_rule.slots)
    )
    scores: dict[int, Tensor] = {}
    for step in reversed(range(len(workload.batches))):
        ids = workload.batches[step]
        part = LossPart(
            lambda m, ids=ids: workload.losses(m, ids), torch.full((len(ids),), 1 / len(ids))
        )
        scores[step], later = step_back(
            model, tape.groups, tape.steps.pop(), tape.update_rule, [part], later
        )
    return torch.stack([scores[step][place] for step, place in workload.removals])


def plain_seconds(workload: Workload) -> float:
    """Seconds of training, with nothing recorded or kept; the lesser of two runs."""
    found = []
    for _ in range(2):
        model = workload.model()
        optimizer = workload.optimizer(model)
        started = time.perf_counter()
        for step in range(len(workload.batches)):
            workload.step(model, optimizer, step)
        found.append(time.perf_counter() - started)
    return min(found)


def measure(name: str, seed: int, chosen: list[str]) -> list[Row]:
    """All estimators on one workload and seed, held against the same retrainings."""
    workload = {"E": images, "F": text}[name](seed) if name in "EF" else digits(name, seed)
    training = plain_seconds(workload)
    plain = workload.train()
    truth = workload.truth(plain)
    rows = []
    for estimator in chosen:
        if estimator in ADAMW_ONLY and name[0] in "AB":
            continue
        print(f"{name} seed {seed}: {estimator}", file=sys.stderr)
        setting, numbers = (
            ESTIMATORS.get(estimator),
            sum(p.numel() for p in plain.model.parameters()),
        )
        started = time.perf_counter()
        if estimator in PEERS:
            scores, numbers = PEERS[estimator](workload), numbers if "full" in estimator else 416
        elif setting is None:
            scores = replay_scores(workload)
        else:
            basis = setting.basis(workload, seed)
            if isinstance(basis, KroneckerBasis) and name[0] in "CDEF":
                continue  # a kronecker basis cannot follow AdamW
            scores, numbers = (
                embedding_scores(workload, basis, setting),
                setting.components or basis.size,
            )
        cost = (time.perf_counter() - started) / training
        rho, r = spearmanr(scores, truth).statistic, pearsonr(scores, truth).statistic
        rows.append(Row(name, estimator, numbers, seed, float(rho), float(r), cost))
    return rows


def main() -> None:
    """Prints a table, or one JSON list."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--workload",
        nargs="+",
        default=list("ABCD"),
        choices=[*"ABCDEF", *(f"{n}-relu" for n in "ABCD")],
    )
    parser.add_argument(
        "--estimator", nargs="+", default=list(ESTIMATORS), choices=[*ESTIMATORS, *PEERS]
    )
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
    print(
        f"{'workload':9}{'estimator':46}{'numbers':>8}  {'spearman: median (min to max)':32}{'cost':>6}"
    )
    for name in arguments.workload:
        for estimator in arguments.estimator:
            own = [row for row in rows if (row.workload, row.estimator) == (name, estimator)]
            if own:
                found = sorted(row.spearman for row in own)
                spread = f"{statistics.median(found):.3f} ({found[0]:.3f} to {found[-1]:.3f})"
                cost = statistics.median(row.cost for row in own)
                print(f"{name:9}{estimator:46}{own[0].numbers:8}  {spread:32}{cost:6.2f}")


if __name__ == "__main__":
    main()

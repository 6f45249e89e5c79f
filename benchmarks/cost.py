"""The cost of capture, embeddings and replay, as ratios to plain training, in turns in one process.

`python -m benchmarks.cost [--repeats 5]`, on workloads E and F, with embeddings in
2,048 coordinates whose blocks are not coupled.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from benchmarks.fidelity import fit_2048_coordinates
from benchmarks.larger import make_images, make_text
from benchmarks.record import random_losses
from benchmarks.timing import format_spread, time_in_turns
from benchmarks.workloads import Workload
from secateur.influence.adjoint import step_back
from secateur.influence.basis import Basis
from secateur.influence.bindings import bind_layers
from secateur.influence.curvature import EmpiricalFisher
from secateur.influence.recorder import Recorder
from secateur.influence.recursion import Dynamics, identity_transition, walk_segment
from secateur.influence.segment import Segment
from secateur.influence.tape import Tape


def measure(workload: Workload, steps: int, repeats: int) -> None:
    """Print one workload's ratios over its first steps, which are one segment."""
    basis = fit_2048_coordinates(workload, 0)
    workload.batches = workload.batches[:steps]
    recorder, segment = train_recorded(workload, basis)
    signed = {f"signs of {n} texts": n for n in (16, 4, 1)} if workload.name == "F" else {}
    functions: dict[str, Callable[[], object]] = {
        "plain": lambda: train_plain(workload),
        "captured": lambda: train_recorded(workload, basis),
        **{name: partial(train_recorded, workload, basis, n) for name, n in signed.items()},
        "embedded": lambda: embed(recorder, segment, basis),
        "one": lambda: replay(workload, 1),
        "two": lambda: replay(workload, 2),
    }
    seconds = time_in_turns(functions, repeats)
    ratios = {
        name: [own / plain for own, plain in zip(values, seconds["plain"], strict=True)]
        for name, values in seconds.items()
    }
    further = [two - one for one, two in zip(ratios["one"], ratios["two"], strict=True)]
    print(f"workload {workload.name}, {steps} steps, times plain training:")
    print(f"  training with capture in 2,048 coordinates  {format_spread(ratios['captured'])}")
    for name in signed:
        print(f"  the same, with {name} per step {format_spread(ratios[name])}")
    print(f"  embeddings of these, empirical Fisher       {format_spread(ratios['embedded'])}")
    print(f"  replay of one target                        {format_spread(ratios['one'])}")
    print(f"  replay of each further target               {format_spread(further)}")


def train_plain(workload: Workload) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Train without recording."""
    model = workload.model()
    optimizer = workload.optimizer(model)
    for step in range(len(workload.batches)):
        workload.step(model, optimizer, step)
    return model, optimizer


def train_recorded(workload: Workload, basis: Basis, texts: int = 0) -> tuple[Recorder, Segment]:
    """Train and record every step.

    Args:
        texts: how many of a step's texts give a gradient with a random sign per token, for the
            curvature.
    """
    model = workload.model()
    optimizer = workload.optimizer(model)
    recorder = Recorder(model, optimizer, bind_layers(model), basis)
    generator = torch.Generator().manual_seed(0)
    for step, ids in enumerate(workload.batches):
        if texts:
            x, y = workload.data(ids[:texts])
            weights = torch.full((texts,), 1 / len(ids), dtype=torch.float64)
            factors = torch.full((texts,), y.shape[1] * len(ids) / texts)
            (signed,) = random_losses(model, x, y, 0, generator)
            recorder.record_fisher(signed, weights, factors)
        workload.step(model, optimizer, step, None, recorder)
    return recorder, recorder.take_segment()


def embed(recorder: Recorder, segment: Segment, basis: Basis) -> None:
    """Compute the embeddings of a recorded segment."""
    fisher = EmpiricalFisher(segment, basis.spans)
    dynamics = Dynamics.from_segment(segment, recorder.update_rule, fisher, basis.spans)
    dtype = segment.contributions.dtype
    walk_segment(dynamics, identity_transition(basis.spans, 3, dtype, theta_only=True))


def replay(workload: Workload, targets: int) -> None:
    """Train and keep every state, then go back through the steps for some targets."""
    model = workload.model()
    optimizer = workload.optimizer(model)
    tape = Tape(model, optimizer)
    for step in range(len(workload.batches)):
        workload.step(model, optimizer, step)
    tape.close()
    ones = {name: torch.ones_like(p) for name, p in model.named_parameters()}
    adjoints = [tape.groups.start_adjoint(ones, 2) for _ in range(targets)]
    for ids in reversed(workload.batches):
        state = tape.steps.pop()
        part = workload.loss_part(ids)
        for number, adjoint in enumerate(adjoints):
            _, adjoints[number] = step_back(
                model, tape.groups, state, tape.update_rule, [part], adjoint
            )


def main() -> None:
    """Print both workloads' ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    torch.set_num_threads(1)
    measure(make_images(0), 60, repeats)
    measure(make_text(0), 30, repeats)


if __name__ == "__main__":
    main()

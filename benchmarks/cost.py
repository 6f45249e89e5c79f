"""What capture, embeddings and replay cost, as ratios to plain training, by turns in one process.

`python -m benchmarks.cost [--repeats 5]`, on workloads E and F; embeddings in 2,048 coordinates, blocks uncoupled.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch

from benchmarks.fidelity import two_thousand
from benchmarks.larger import images, text
from benchmarks.timing import by_turns, spread
from benchmarks.workloads import Workload
from secateur.influence.adjoint import LossPart, Tape, step_back
from secateur.influence.bindings import bind_layers
from secateur.influence.curvature import EmpiricalFisher
from secateur.influence.recorder import Recorder
from secateur.influence.recursion import Dynamics, identity_transition, walk_segment
from secateur.influence.segment import Segment


def measure(workload: Workload, steps: int, repeats: int) -> None:
    """Prints one workload's ratios over its first steps, as one segment."""
    workload.batches = workload.batches[:steps]
    basis = two_thousand(workload, 0)

    def plain() -> None:
        model = workload.model()
        optimizer = workload.optimizer(model)
        for step in range(steps):
            workload.step(model, optimizer, step)

    def captured() -> tuple[Recorder, Segment]:
        model = workload.model()
        optimizer = workload.optimizer(model)
        recorder = Recorder(model, optimizer, bind_layers(model), basis)
        for step in range(steps):
            workload.step(model, optimizer, step, None, recorder)
        return recorder, recorder.take_segment()

    recorder, segment = captured()

    def embedded() -> None:
        dynamics = Dynamics.from_segment(
            segment, recorder.update_rule, EmpiricalFisher(segment, basis.spans), basis.spans
        )
        walk_segment(
            dynamics,
            identity_transition(basis.spans, 3, segment.contributions.dtype, theta_only=True),
        )

    def replayed(targets: int) -> Callable[[], None]:
        def body() -> None:
            model = workload.model()
            optimizer = workload.optimizer(model)
            tape = Tape(model, optimizer)
            for step in range(steps):
                workload.step(model, optimizer, step)
            tape.close()
            ones = {name: torch.ones_like(p) for name, p in model.named_parameters()}
            later = [tape.groups.start_adjoint(ones, 2) for _ in range(targets)]
            for step in reversed(range(steps)):
                ids, moment = workload.batches[step], tape.steps.pop()
                part = LossPart(
                    lambda m, ids=ids: workload.losses(m, ids),
                    torch.full((len(ids),), 1 / len(ids)),
                )
                for n, q in enumerate(later):
                    _, later[n] = step_back(model, tape.groups, moment, tape.update_rule, [part], q)

        return body

    bodies = {
        "plain": plain,
        "captured": captured,
        "embedded": embedded,
        "one": replayed(1),
        "two": replayed(2),
    }
    seconds = by_turns(bodies, repeats)
    ratio = {
        name: [a / b for a, b in zip(found, seconds["plain"], strict=True)]
        for name, found in seconds.items()
    }
    further = [two - one for one, two in zip(ratio["one"], ratio["two"], strict=True)]
    print(f"workload {workload.name}, {steps} steps, times plain training:")
    print(f"  training with capture in 2,048 coordinates  {spread(ratio['captured'])}")
    print(f"  embeddings of these, empirical Fisher       {spread(ratio['embedded'])}")
    print(f"  replay of one target                        {spread(ratio['one'])}")
    print(f"  replay of each further target               {spread(further)}")


def main() -> None:
    """Prints both workloads."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    torch.set_num_threads(1)
    measure(images(0), 60, repeats)
    measure(text(0), 30, repeats)


if __name__ == "__main__":
    main()

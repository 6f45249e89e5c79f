"""Embedding a stage's 16 segments on one and on two workers, beside the same function called in a plain loop.

    python -m benchmarks.workers [--repeats 5] [--steps 10] [--kinds threads processes dask ray]

By turns, each time with the embeddings removed before; the workers are running when the clock starts, one torch thread each. With one
worker of any kind the tasks run in the flow's own process. What counts is the ratio of times: how many times as fast.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from prefect import flow

from benchmarks.timing import spread
from secateur.flows.workers import Call, WorkerPool, worker_pool
from secateur.tasks.data.samples import list_stage_samples
from secateur.tasks.engine.prefect_server import prefect_server
from secateur.tasks.plan import WorkersConfig
from secateur.tasks.run.run import Run
from secateur.tasks.training.fit_basis import fit_basis
from secateur.tasks.training.train import train_stage
from secateur.tasks.valuation.embed import embed_segment
from tests.tasks.small import make_data, small_plan

SEGMENTS, WIDTH, BATCH = 16, 16, 32  # 64-16-10: 1,210 numbers a sample, all of them recorded


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=10, help="of a segment")
    parser.add_argument("--kinds", nargs="+", default=["threads", "processes", "dask", "ray"])
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, prefect_server():
        measure(trained(Path(name), options.steps), options.kinds, options.repeats)


@flow(name="workers")
def measure(run_url: str, kinds: list[str], repeats: int) -> None:
    """Times every body by turns, and prints what came of it."""
    with ExitStack() as stack:
        bodies: dict[str, Callable[[], None]] = {"plain loop": lambda: plain(run_url)}
        bodies["1 worker"] = on(stack.enter_context(worker_pool(WorkersConfig(count=1))), run_url)
        for kind in kinds:
            workers = stack.enter_context(
                worker_pool(WorkersConfig.model_validate({"kind": kind, "count": 2}))
            )
            bodies[f"2 {kind}"] = on(workers, run_url)
        seconds: dict[str, list[float]] = {name: [] for name in bodies}
        for turn in range(repeats + 1):  # the first starts the workers
            for name, body in bodies.items():
                clear(run_url)
                begun = time.perf_counter()
                body()
                if turn:
                    seconds[name].append(time.perf_counter() - begun)
    print(
        f"{SEGMENTS} segments; how many times as fast as one worker, and as the plain loop; seconds"
    )
    for name, found in seconds.items():
        ratios = [
            spread([other / own for other, own in zip(seconds[base], found, strict=True)])
            for base in ("1 worker", "plain loop")
        ]
        print(f"{name:12} {ratios[0]:>22} {ratios[1]:>22} {spread(found, 1):>24}", flush=True)


def trained(folder: Path, steps: int) -> str:
    """A run with a trained stage of 16 segments."""
    make_data(folder)
    plan = small_plan(
        folder, model={"factory": "tests.tasks.small:network", "args": {"width": WIDTH}},
        basis={"kind": "coordinates", "numbers": None, "fit_steps": 1}, segment_steps=steps,
        stages=[{"steps": SEGMENTS * steps, "batch_size": BATCH}],
    )  # fmt: skip
    run = Run.start(plan)
    list_stage_samples.fn(run.url, 0)
    fit_basis.fn(run.url)
    train_stage.fn(run.url, 0)
    return run.url


def plain(run_url: str) -> None:
    for number in range(SEGMENTS):
        embed_segment.fn(run_url, 0, number)


def on(workers: WorkerPool, run_url: str) -> Callable[[], None]:
    """The same by some workers."""
    calls = [Call(embed_segment, (run_url, 0, number)) for number in range(SEGMENTS)]
    return lambda: workers.map(calls, "embedding")


def clear(run_url: str) -> None:
    folder = Run.open(run_url).folder.stage(0)
    for number in range(SEGMENTS):
        folder.local(number).remove()


if __name__ == "__main__":
    main()

"""Embed a stage's 16 segments on one and on two workers, and in a plain loop.

    python -m benchmarks.workers [--repeats 5] [--steps 10] [--kinds threads processes dask ray]

They run in turns. The embeddings are removed before each turn, and the workers have started when
the clock starts. Each has one torch thread. With one worker of any kind the tasks run in the flow's
own process. The result is how many times as fast each is.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from prefect import flow

from benchmarks.timing import format_spread
from secateur.flows import pipeline_tasks
from secateur.flows.stage import train_stage
from secateur.flows.workers import Call, InlineWorkers, WorkerPool, worker_pool
from secateur.tasks.engine.prefect_server import prefect_server
from secateur.tasks.plan import WorkersConfig
from secateur.tasks.run import Run
from tests.tasks.small import make_data, small_plan

# An MLP 64-16-10: 1,210 coefficients per sample, all of them recorded.
SEGMENTS, WIDTH, BATCH = 16, 16, 32


def main() -> None:
    """Train the stage, then time every kind of workers."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=10, help="steps of each segment")
    parser.add_argument("--kinds", nargs="+", default=["threads", "processes", "dask", "ray"])
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, prefect_server():
        measure(train(Path(name), options.steps), options.kinds, options.repeats)


@flow(name="workers")
def measure(run_url: str, kinds: list[str], repeats: int) -> None:
    """Time every kind of workers in turns, and print the ratios."""
    with ExitStack() as stack:
        one = stack.enter_context(worker_pool(WorkersConfig(count=1)))
        functions: dict[str, Callable[[], None]] = {
            "plain loop": lambda: embed_in_loop(run_url),
            "1 worker": lambda: embed_on(one, run_url),
        }
        for kind in kinds:
            config = WorkersConfig.model_validate({"kind": kind, "count": 2})
            pool = stack.enter_context(worker_pool(config))
            functions[f"2 {kind}"] = partial(embed_on, pool, run_url)
        seconds: dict[str, list[float]] = {name: [] for name in functions}
        # The first turn starts the workers and does not count.
        for turn in range(repeats + 1):
            for name, function in functions.items():
                remove_embeddings(run_url)
                start = time.perf_counter()
                function()
                if turn:
                    seconds[name].append(time.perf_counter() - start)
    print_ratios(seconds)


def print_ratios(seconds: dict[str, list[float]]) -> None:
    """Print how many times as fast each is as one worker and as the plain loop."""
    print(
        f"{SEGMENTS} segments; how many times as fast as one worker, and as the plain loop; seconds"
    )
    for name, own in seconds.items():
        ratios = []
        for base in ("1 worker", "plain loop"):
            pairs = zip(seconds[base], own, strict=True)
            ratios.append(format_spread([base_time / own_time for base_time, own_time in pairs]))
        spread = format_spread(own, 1)
        print(f"{name:12} {ratios[0]:>22} {ratios[1]:>22} {spread:>24}", flush=True)


def train(folder: Path, steps: int) -> str:
    """Train a stage of 16 segments, and return the run's URL."""
    make_data(folder)
    plan = small_plan(
        folder,
        model={"factory": "tests.tasks.digits:network", "args": {"width": WIDTH}},
        basis={"kind": "coordinates", "numbers": None, "fit_steps": 1},
        segment_steps=steps,
        stages=[{"steps": SEGMENTS * steps, "batch_size": BATCH}],
    )
    run = Run.start(plan)
    train_stage(InlineWorkers(), run.url, 0)
    return run.url


def embed_in_loop(run_url: str) -> None:
    """Embed the segments one after the other, as a plain function."""
    for number in range(SEGMENTS):
        pipeline_tasks.embed_part.run_without_prefect(run_url, 0, number)


def embed_on(pool: WorkerPool, run_url: str) -> None:
    """Embed the segments on some workers."""
    task = pipeline_tasks.embed_part
    pool.map([Call(task, (run_url, 0, number)) for number in range(SEGMENTS)], "embedding")


def remove_embeddings(run_url: str) -> None:
    """Remove the segments' embeddings."""
    folder = Run.open(run_url).folder.stage(0)
    for number in range(SEGMENTS):
        folder.embedded(number).remove()


if __name__ == "__main__":
    main()

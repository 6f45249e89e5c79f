"""Does a score find what the next stage should not train on? Three studies try it.

They are about wrong labels, mixed text and duplicates.

`python -m benchmarks.pruning [labels domains duplicates] [--seeds 5]` prints every table of
docs/pruning.md and draws its figures. Each seed of a study writes its results to data/pruning, and
an interrupted benchmark continues from there.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import domains, duplicates, labels
from benchmarks.mislabelled import WORKLOADS
from benchmarks.pruning_report import report_domains, report_duplicates, report_labels
from secateur.tasks.engine.progress import print_status

RESULTS = Path("data/pruning")
Study = Callable[[Path], dict[str, Any]]


def list_jobs(study: str, seeds: int) -> dict[str, Study]:
    """Return what one study runs, by the name of its results."""
    jobs: dict[str, Study] = {}
    for seed in range(seeds):
        if study == "labels":
            for name, kind in WORKLOADS:
                job = partial(labels.study, name=name, kind=kind, seed=seed)
                jobs[f"labels-{name}-{kind}-{seed}"] = job
        elif study == "domains":
            jobs[f"domains-{seed}"] = partial(domains.study, seed=seed)
        else:
            jobs[f"duplicates-{seed}"] = partial(duplicates.study, seed=seed)
    return jobs


def run_jobs(jobs: dict[str, Study]) -> None:
    """Run the jobs that have no results yet."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    missing = {
        name: study for name, study in jobs.items() if not (RESULTS / f"{name}.json").exists()
    }
    for number, (name, study) in enumerate(missing.items(), 1):
        print_status(f"{name}, {number} of {len(missing)}")
        start = time.monotonic()
        process_start = time.process_time()
        with tempfile.TemporaryDirectory() as folder:
            result = study(Path(folder))
        (RESULTS / f"{name}.json").write_text(json.dumps(result))
        seconds = time.monotonic() - start
        computing = time.process_time() - process_start
        print_status(f"  took {seconds:.0f} s, {computing:.0f} s of them computing")


def read_results(jobs: dict[str, Study]) -> dict[str, dict[str, Any]]:
    """Return the results of every job."""
    return {name: json.loads((RESULTS / f"{name}.json").read_text()) for name in jobs}


def main() -> None:
    """Run the studies and print their tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("studies", nargs="*", default=["labels", "domains", "duplicates"])
    parser.add_argument("--seeds", type=int, default=5)
    arguments = parser.parse_args()
    reports = {"labels": report_labels, "domains": report_domains, "duplicates": report_duplicates}
    for study in arguments.studies:
        jobs = list_jobs(study, arguments.seeds)
        run_jobs(jobs)
        reports[study](read_results(jobs))


if __name__ == "__main__":
    main()

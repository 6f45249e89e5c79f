"""Does a score find what the next stage should not see? Wrong labels, mixed text, duplicates: three studies.

`python -m benchmarks.pruning [labels domains duplicates] [--seeds 5]` prints every table of docs/pruning.md and draws its
figures. Each seed of a study leaves its results in data/pruning, from where an interrupted benchmark carries on.
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


def jobs(study: str, seeds: int) -> dict[str, Study]:
    """What one study runs, by the name of its results."""
    found: dict[str, Study] = {}
    for seed in range(seeds):
        if study == "labels":
            for name, kind in WORKLOADS:
                found[f"labels-{name}-{kind}-{seed}"] = partial(
                    labels.study, name=name, kind=kind, seed=seed
                )
        else:
            module = {"domains": domains, "duplicates": duplicates}[study]
            found[f"{study}-{seed}"] = partial(module.study, seed=seed)
    return found


def carry_out(found: dict[str, Study]) -> None:
    """Runs what has left no results yet."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    missing = {
        name: study for name, study in found.items() if not (RESULTS / f"{name}.json").exists()
    }
    for number, (name, study) in enumerate(missing.items(), 1):
        print_status(f"{name}, {number} of {len(missing)}")
        start, used = time.monotonic(), time.process_time()
        with tempfile.TemporaryDirectory() as folder:
            result = study(Path(folder))
        (RESULTS / f"{name}.json").write_text(json.dumps(result))
        print_status(
            f"  took {time.monotonic() - start:.0f} s, {time.process_time() - used:.0f} s of them computing"
        )


def results(found: dict[str, Study]) -> dict[str, dict[str, Any]]:
    """What every job left."""
    return {name: json.loads((RESULTS / f"{name}.json").read_text()) for name in found}


def main() -> None:
    """Runs the studies and prints their tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("studies", nargs="*", default=["labels", "domains", "duplicates"])
    parser.add_argument("--seeds", type=int, default=5)
    arguments = parser.parse_args()
    reports = {"labels": report_labels, "domains": report_domains, "duplicates": report_duplicates}
    for study in arguments.studies:
        found = jobs(study, arguments.seeds)
        carry_out(found)
        reports[study](results(found))


if __name__ == "__main__":
    main()

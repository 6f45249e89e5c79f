"""The text example keeps what helps a manual, from three domains.

`python -m examples.text.run`
"""

from __future__ import annotations

import json
from typing import Any

from examples.closing import read_with_control, run_and_show
from examples.text.make_shards import make
from secateur.tasks.data.samples import read_stage_samples
from secateur.tasks.results.pruning_results import read_decisions
from secateur.tasks.run import Run

PLAN = "examples/text/plan.yaml"


def describe(sample: dict[str, Any]) -> str:
    """Describe a sample: its domain, and how it begins."""
    text = sample["txt"].decode(errors="replace")[:50]
    return f"{json.loads(sample['json'])['domain']}: {text!r}"


def main() -> None:
    """Write the shards, run the plan and its control, and print the final tables."""
    make("data/text", seed=0)
    plans = read_with_control(PLAN)
    run_and_show(plans, describe)
    run = Run.of_plan(plans[0])
    samples = read_stage_samples(run, 0)
    keep = read_decisions(run, 0)["keep"].to_list()
    facts = [json.loads(sample["json"]) for sample in samples.read(range(len(samples)))]
    kept: dict[str, list[bool]] = {}
    for fact, flag in zip(facts, keep, strict=True):
        kept.setdefault(fact["domain"], []).append(flag)
    for domain, flags in sorted(kept.items()):
        print(f"{domain}: {sum(flags)} of {len(flags)} kept")
    command = f"secateur query {run.url} --target manual --top 5"
    print(f"the run is in {run.url}; ask it: {command}")


if __name__ == "__main__":
    main()

"""The text example: what of three domains serves the manual; `python -m examples.text.run`."""

from __future__ import annotations

import json
from typing import Any

from examples.closing import run_and_show, with_control
from examples.text.make_shards import make
from secateur.tasks.data.samples import read_stage_samples
from secateur.tasks.pruning.prune import read_decisions
from secateur.tasks.run.run import Run

PLAN = "examples/text/plan.yaml"


def describe(sample: dict[str, Any]) -> str:
    """The domain of a sample, and how it begins."""
    text = sample["txt"].decode(errors="replace")[:50]
    return f"{json.loads(sample['json'])['domain']}: {text!r}"


def main() -> None:
    """Makes the shards, runs the plan and its control, prints the closing tables."""
    make("data/text", seed=0)
    plans = with_control(PLAN)
    run_and_show(plans, describe)
    run = Run.of(plans[0])
    samples, keep = read_stage_samples(run, 0), read_decisions(run, 0)["keep"].to_list()
    domains = [json.loads(s["json"])["domain"] for s in samples.read(range(len(samples)))]
    for domain in sorted(set(domains)):
        kept = [k for k, d in zip(keep, domains, strict=True) if d == domain]
        print(f"{domain}: {sum(kept)} of {len(kept)} kept")
    print(f"the run is in {run.url}; ask it: secateur query {run.url} --target manual --top 5")


if __name__ == "__main__":
    main()

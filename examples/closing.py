"""The end of an example: a table of its stages and a control's, and its influential samples."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rich.table import Table

from secateur.flows.curate import curate
from secateur.flows.query import query
from secateur.flows.tables import describe_drops, print_audits, print_table
from secateur.tasks.comparison.arm_runs import share_outputs
from secateur.tasks.comparison.arms import RANDOM, STANDARD_ARMS, arm_plan
from secateur.tasks.data.samples import read_stage_samples
from secateur.tasks.plan import Plan
from secateur.tasks.plan.plan_file import read_plan
from secateur.tasks.reporting.summary import StageSummary
from secateur.tasks.run import Run

Describe = Callable[[dict[str, Any]], str]


def read_with_control(path: str, **changes: Any) -> tuple[Plan, Plan]:
    """Read a plan, and make a control whose stages keep the same number of samples at random.

    The control is not audited.
    """
    plan = read_plan(path, changes)
    shares = {}
    for number, stage in enumerate(plan.stages):
        fraction = stage.prune.keep_fraction if stage.prune else None
        shares[number] = 1.0 if fraction is None else fraction
    return plan, arm_plan(plan, f"{plan.run}-random", STANDARD_ARMS[RANDOM], shares)


def run_and_show(plans: tuple[Plan, Plan], describe: Describe) -> None:
    """Run a plan and its control, and print their stages and the most influential samples.

    Args:
        describe: returns what a sample is, in words.
    """
    plan, control = plans
    summaries = {plan.run: curate(plan)}
    # The first stage is trained only once.
    share_outputs(Run.start(control), Run.of_plan(plan).url)
    summaries[control.run] = curate(control)
    _print_stages(summaries)
    for harmful in (False, True):
        _print_influential(Run.of_plan(plan), harmful, describe)


def _print_stages(summaries: dict[str, list[StageSummary]]) -> None:
    first = next(iter(summaries.values()))[0]
    columns = [f"{target} {name}" for target, name, _ in _list_figures(first)]
    table = Table("run", "stage", "in", "kept", "dropped", *columns)
    stages = [(run, stage) for run, summary in summaries.items() for stage in summary]
    for run, stage in stages:
        pruned = stage.pruned
        kept = [str(pruned.kept), describe_drops(pruned)] if pruned else ["all", "not pruned"]
        figures = [f"{value:.3f}" for _, _, value in _list_figures(stage)]
        table.add_row(run, str(stage.stage), str(stage.samples), *kept, *figures)
    print_table(table)
    audits = [stage.audited for _, stage in stages if stage.audited]
    if audits:
        print_audits(audits)


def _list_figures(stage: StageSummary) -> list[tuple[str, str, float]]:
    """Each target's figures: the target, the name and the value."""
    return [
        (target, name, value)
        for target, figures in stage.targets.items()
        for name, value in figures.items()
        if name != "samples"
    ]


def _print_influential(run: Run, harmful: bool, describe: Describe) -> None:
    """Print the five samples that most lowered or raised the loss of the target pruned for."""
    samples = read_stage_samples(run, 0)
    rows = {key: row for row, key in enumerate(samples.frame["key"])}
    target = run.plan.pruning_target
    kind = "harmful" if harmful else "helpful"
    title = f"the 5 most {kind} samples for target {target}"
    table = Table("rank", "score", "key", "stage", "step", "sample", title=title)
    for hit in query(run.url, target=target, top=5, harmful=harmful).hits:
        (sample,) = samples.read([rows[hit.key]])
        place = (str(hit.stage), str(hit.step))
        table.add_row(str(hit.rank), f"{hit.score:+.2e}", hit.key, *place, describe(sample))
    print_table(table)

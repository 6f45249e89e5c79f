"""What an example ends with: its stages beside a control's, and its most influential samples."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rich.table import Table

from secateur.flows.curate import curate
from secateur.flows.query import query
from secateur.flows.tables import describe_drops, print_audits, print_table
from secateur.tasks.comparison.arm_runs import share_outputs
from secateur.tasks.comparison.arms import ALWAYS, RANDOM, arm_plan
from secateur.tasks.data.samples import read_stage_samples
from secateur.tasks.plan import Plan
from secateur.tasks.plan.plan_file import read_plan
from secateur.tasks.reporting.summary import StageSummary
from secateur.tasks.run.run import Run


def with_control(path: str, **changes: Any) -> tuple[Plan, Plan]:
    """The plan in a file, and one whose stages keep as many samples at random; the control is not audited."""
    plan = read_plan(path, changes)
    shares = {n: getattr(stage.prune, "keep", 1.0) for n, stage in enumerate(plan.stages)}
    return plan, arm_plan(plan, f"{plan.run}-random", ALWAYS[RANDOM], shares)


def run_and_show(plans: tuple[Plan, Plan], describe: Callable[[dict[str, Any]], str]) -> None:
    """Runs a plan and its control, and prints the closing tables; `describe` says what a sample is."""
    own = curate(plans[0])
    share_outputs.fn(
        Run.start(plans[1]).url, Run.of(plans[0]).url
    )  # the first stage is trained once
    summaries = {plans[0].run: own, plans[1].run: curate(plans[1])}
    table = Table("run", "stage", "in", "kept", "dropped", *_columns(summaries[plans[0].run]))
    for name, summary in summaries.items():
        for stage in summary:
            table.add_row(name, *_row(stage))
    print_table(table)
    if audits := [
        stage.audited for summary in summaries.values() for stage in summary if stage.audited
    ]:
        print_audits(audits)
    run = Run.of(plans[0])
    samples = read_stage_samples(run, 0)
    place = {key: row for row, key in enumerate(samples.frame["key"])}
    for harmful in (False, True):
        hits = query(run.url, target=plans[0].target, top=5, harmful=harmful)
        title = (
            f"the 5 most {'harmful' if harmful else 'helpful'} samples for target {plans[0].target}"
        )
        shown = Table("rank", "score", "key", "stage", "step", "sample", title=title)
        for hit in hits:
            sample = samples.read([place[hit.key]])[0]
            shown.add_row(
                str(hit.rank),
                f"{hit.score:+.2e}",
                hit.key,
                str(hit.stage),
                str(hit.step),
                describe(sample),
            )
        print_table(shown)


def _columns(summary: list[StageSummary]) -> list[str]:
    return [
        f"{name} {figure}"
        for name, figures in summary[0].targets.items()
        for figure in figures
        if figure != "samples"
    ]


def _row(stage: StageSummary) -> list[str]:
    own = stage.pruned
    kept = [str(own.kept), describe_drops(own)] if own else ["all", "not pruned"]
    figures = [
        f"{v:.3f}" for target in stage.targets.values() for k, v in target.items() if k != "samples"
    ]
    return [str(stage.stage), str(stage.samples), *kept, *figures]
